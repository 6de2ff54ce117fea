"""Self-contained HTML reports of evaluations, of a corpus and of prepared samples.

`evaluation` and `data_split` read the files of a run; `evaluation_page` assembles the sections of
an evaluation. `paper_tables`, `linearization_tables` and `category_tables` build the paper's tables
as plain values (`table`), which `markdown_export` writes as Markdown and CSV. `corpus_page` is the
survey of a corpus, `samples_page` prepared samples. Python computes plain values; `document` fills
the templates with them, which escape everything, and `svg` draws every chart. Every figure on a
page is read from a file of the run, from the survey or from the shards; the paper's figures are
marked as such. Must not import torch or ray.
"""

from d2i.report.corpus_page import write_corpus_report
from d2i.report.evaluation import Evaluation, read_evaluation
from d2i.report.evaluation_page import write_report
from d2i.report.samples_page import ShownCodec, ShownSample, write_samples_page

__all__ = [
    "Evaluation",
    "ShownCodec",
    "ShownSample",
    "read_evaluation",
    "write_corpus_report",
    "write_report",
    "write_samples_page",
]
