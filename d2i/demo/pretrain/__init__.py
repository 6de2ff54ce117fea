"""Makes the small published network that the demo ships: codec, CLIP pair, backbone.

Run once by a maintainer (`python -m d2i.demo.pretrain --out DIR`); the demo itself only reads the
result. Held-out scenes never occur here.
"""
