"""The demo (`d2i demo`): its made (synthetic) world, judge, small shipped network and stages."""
