"""How raw becomes features: fetch, load, validate, featurize."""
