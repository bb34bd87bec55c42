"""How features become a bundle: fit, evaluate, package."""
