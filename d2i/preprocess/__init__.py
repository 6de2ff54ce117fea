"""From a corpus to shards: plan, fetch, encode, publish (`d2i preprocess`)."""
