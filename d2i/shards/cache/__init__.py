"""Shards of object stores, cached as local files that all processes of a machine share."""
