"""How a bundle goes live and is watched: drift, register."""
