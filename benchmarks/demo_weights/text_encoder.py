"""Training of the text tower on dialogs, as the real CLIP has seen conversations on the web.

The tower's states of captions stay the same, so the backbone trained on them still generates images
from captions. Its states of dialogs are new to the backbone, and left to fine-tuning.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional

from benchmarks.demo_weights.clip import ClipPair, Readers, pooled_end
from benchmarks.demo_weights.texts import Texts, labels, to_rows
from benchmarks.demo_weights.vae import learning_rate

_NUM_CAPTIONS = 64
_NUM_DIALOGS = 128
_PEAK_LR = 2e-3
# Weight of the squared change of caption states, against the labels' mean cross entropy.
_KEEP_WEIGHT = 30.0


def train_on_dialogs(pair: ClipPair, captions: Texts, dialogs: Texts, num_steps: int) -> None:
    """Train the text tower in place, with new readers that predict each dialog's attributes.

    Args:
        pair: a trained pair; its image tower is not changed.
        captions: texts whose last hidden states should not change.
        dialogs: texts whose attributes are read at the first end token.
        num_steps: optimizer steps; the learning rate ends at 0.
    """
    before, readers = copy.deepcopy(pair.text).eval(), Readers()
    parameters = [*pair.text.train().parameters(), *readers.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=_PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: learning_rate(s, num_steps))
    caption_rows, dialog_rows = (
        to_rows(texts.windows_NT, pair.clip_ids) for texts in (captions, dialogs)
    )
    labels_NA = labels(dialogs.scenes)
    generator = torch.Generator().manual_seed(0)
    for step in range(num_steps):
        kept = caption_rows[torch.randint(len(caption_rows), (_NUM_CAPTIONS,), generator=generator)]
        chosen = torch.randint(len(dialog_rows), (_NUM_DIALOGS,), generator=generator)
        with torch.no_grad():
            wanted = before(kept).last_hidden_state
        change = functional.mse_loss(pair.text(kept).last_hidden_state, wanted)
        hidden_states = pair.text(dialog_rows[chosen]).last_hidden_state
        end = pooled_end(hidden_states, dialog_rows[chosen], pair.text.config.eos_token_id)
        read = readers.loss(end, labels_NA[chosen])
        optimizer.zero_grad()
        (_KEEP_WEIGHT * change + read).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(
                f"reading step {step} of {num_steps}: change {change.item():.5f}, "
                f"labels {read.item():.4f}",
                flush=True,
            )
    pair.text.eval()
