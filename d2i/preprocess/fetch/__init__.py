"""Bytes of pictures: from the corpus's folder, or from strangers' addresses.

`reasons` names the failures; `guard` decides which address may be asked, `resolver` finds it,
`connect` reaches it, straight or through a `proxy`, `request` asks it once and reads its `body`,
which `watchdog` ends at its deadline; `known_placeholders` tells what stands for another picture,
`hosts` keeps the manners, `spread` the order, `addresses` tries several in turn, `engine` runs many
of them through img2dataset, `sources` is the door. Every failure is a value with a reason.
"""
