"""Pretraining of the small networks that the demo ships: codec, CLIP pair, backbone.

Run once by a maintainer (`python -m d2i.demo.pretrain --out DIR`); the demo itself only reads the
result. Never trains on held-out scenes.
"""
