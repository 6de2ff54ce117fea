"""One self-contained HTML page that shows what was evaluated, beside the files it came from.

`evaluation` and `dataset` read, each other module draws one section, `page` puts them together.
Every figure on the page is read from a file of the run. Must not import torch or ray.
"""

from d2i.report.evaluation import Evaluation, read_evaluation
from d2i.report.page import write_report

__all__ = ["Evaluation", "read_evaluation", "write_report"]
