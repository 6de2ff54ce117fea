"""Bytes of pictures: from the corpus's folder, or from strangers' addresses.

`reasons` names the failures; `guard` decides which address may be asked, `resolver` finds it,
`request` asks it once, `hosts` keeps the manners, `addresses` tries several in turn, `engine` runs
many of them through img2dataset, `sources` is the door. Every failure is a value with a reason.
"""
