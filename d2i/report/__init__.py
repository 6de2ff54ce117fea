"""Self-contained HTML pages: what was evaluated, what a corpus holds, what samples look like.

`evaluation` and `dataset` read the files of a run; `page` puts the sections of an evaluation
together, each rendered by a module of its own. `paper_tables`, `readings` and `categories` make the
paper's tables out of plain values (`tabulated`), which `sections` renders and `markdown_export`
writes as Markdown and CSV. `corpus` makes the page of a survey of a corpus, `samples` that of
prepared samples. `document`, `html`, `counts` and `svg` are what pages are made of. Every figure on
a page is read from a file of the run, from the survey or from the shards; what the paper says is
marked as the paper's. Must not import torch or ray.
"""

from d2i.report.corpus import write_corpus_report
from d2i.report.evaluation import Evaluation, read_evaluation
from d2i.report.page import write_report
from d2i.report.samples import ShownSample, write_samples_page

__all__ = [
    "Evaluation",
    "ShownSample",
    "read_evaluation",
    "write_corpus_report",
    "write_report",
    "write_samples_page",
]
