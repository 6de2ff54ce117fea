"""The demo (`d2i demo`): a made (synthetic) world, its judge, a small shipped network, stages."""
