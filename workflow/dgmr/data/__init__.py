"""Data: a table of image URLs becomes shards; labelled images become evaluation shards."""
