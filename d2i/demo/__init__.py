"""The demo: a made world, its judge, a small shipped network, every stage (`d2i demo`)."""
