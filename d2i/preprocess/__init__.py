"""Preprocessing of a corpus into shards: plan, fetch, encode, publish (`d2i preprocess`)."""
