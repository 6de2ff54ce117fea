"""The corpus command: a survey, leaks between splits, and captions for the images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2i.cli.options import CorpusOption, JsonOption, SetOption, SourceOption, existing_source
from d2i.cli.output import counted, print_result
from d2i.errors import ConfigError
from d2i.io.progress_bar import Counts, ProgressBar

if TYPE_CHECKING:
    from d2i.config import DialogConfig
    from d2i.corpus_analysis.leakage import Leak

_MANY_OCCURRENCES = 10_000
"""Ten times the samples of a usual shard."""


def corpus(
    corpus: CorpusOption,
    source: SourceOption,
    report: Annotated[str | None, typer.Option(help="Write the survey as an HTML page.")] = None,
    leaks: Annotated[
        str | None, typer.Option(help="Write the leaking instances, for preprocess --exclude.")
    ] = None,
    sample: Annotated[
        int, typer.Option(min=0, help="Instances per split to tokenize, for context lengths.")
    ] = 2000,
    split: Annotated[
        str | None, typer.Option(metavar="SHARES", help="Split one unsplit file: 0.8,0.1,0.1.")
    ] = None,
    describe: Annotated[
        str | None, typer.Option(metavar="CAPTIONER", help="Caption the images with this model.")
    ] = None,
    descriptions: Annotated[
        Path | None, typer.Option(help="Output file of --describe; the same command resumes.")
    ] = None,
    settings: SetOption = None,
    *,
    images: Annotated[
        bool,
        typer.Option(
            "--pictures/--no-pictures", help="Open image files to find near duplicates and damage."
        ),
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Show what a corpus holds, and which images its splits share.

    The survey has counts, lengths, record issues, the effect of each setting, and leaks between
    splits.

    Examples:

        d2i corpus --corpus mmdialog --source d2i-demo/corpus --report corpus.html

        d2i corpus --corpus mmdialog --source d2i-demo/corpus --leaks leaks.jsonl --no-pictures
        --set corpus.own_turn=exclude

        d2i corpus --corpus jsonl --source chats/all.jsonl --split 0.8,0.1,0.1

        d2i corpus --corpus mmdialog --source MMDialog --descriptions descriptions.jsonl
        --describe Salesforce/blip-image-captioning-base
    """
    from d2i.config import DialogConfig, apply_settings

    config = apply_settings(DialogConfig(), settings or [])
    if split is not None:
        divided = config.corpus.divided(split, config.corpus.split_seed or 0)
        config = config.model_copy(update={"corpus": divided})
    existing_source(source)
    if (describe is None) != (descriptions is None):
        raise ConfigError(
            "got only one of --describe and --descriptions; expected both: a model, and the file "
            "for its captions; give both"
        )
    if describe is not None and descriptions is not None:
        _describe(corpus, source, config, describe, descriptions, as_json=as_json)
        return
    survey = _survey(corpus, source, config, sample, leaks, near_duplicates=images)
    if report is not None:
        from d2i.report import write_corpus_report

        write_corpus_report(survey, report)
    print_result(survey, _lines(survey), as_json=as_json)


def _survey(
    name: str,
    source: str,
    config: DialogConfig,
    num_sampled: int,
    leaks_url: str | None,
    *,
    near_duplicates: bool,
) -> dict[str, Any]:
    import msgspec

    from d2i.corpora import build_corpus, corpus_type, found_splits
    from d2i.corpus_analysis.leakage import LeakFinder, count_leaks
    from d2i.corpus_analysis.survey import survey_split

    splits = found_splits(name, source, config.corpus.options())
    options = config.corpus.options()
    with closing(ProgressBar()) as progress:
        surveyed = {
            split: msgspec.to_builtins(
                survey_split(
                    name,
                    source,
                    split,
                    config,
                    num_sampled=num_sampled,
                    on_dialog=_counting(progress, "dialogs read", split),
                )
            )
            for split in splits
        }
        opened = {split: _counting(progress, "images opened", split) for split in splits}
        finder = LeakFinder(
            build_corpus(name, options),
            source,
            near_duplicates=near_duplicates,
            on_image=lambda split: opened[split](),
        )
        counts = count_leaks(_kept(finder.find(splits), leaks_url))
    seen = msgspec.to_builtins(finder.images)
    return {
        "corpus": name,
        "licence": corpus_type(name).licence,
        "source": source,
        "options": options,
        "text": config.text.model_dump(),
        "splits": {
            split: found | {"pictures": seen.get(split)} for split, found in surveyed.items()
        },
        "leaks": {"near": finder.has_hashed, "counts": counts},
    }


def _kept(leaks: Iterator[Leak], url: str | None) -> Iterator[Leak]:
    """Yield the leaks unchanged, and publish them to a file atomically."""
    import msgspec

    from d2i.io import storage

    if url is None:
        yield from leaks
        return
    directory = url.rpartition("/")[0] or "."
    with storage.scratch_file(directory) as scratch:
        with scratch.open("wb") as file:
            for leak in leaks:
                file.write(msgspec.json.encode(leak) + b"\n")
                yield leak
        storage.publish_atomically(scratch, url)


def _counting(progress: ProgressBar, unit: str, split: str = "") -> Callable[[], None]:
    """Return a function that counts one more item, and shows the count and the rate."""
    count, started = 0, time.monotonic()
    what = f"{split}: {unit}" if split else unit

    def one_more() -> None:
        nonlocal count
        count += 1
        if count % 1000 == 0:
            rate = count / max(time.monotonic() - started, 1e-9)
            line = f"{what}: {count}  {rate:.0f}/s"
            progress.show(Counts(line, count, None, unit, started, note=split))

    return one_more


def _describe(
    name: str,
    source: str,
    config: DialogConfig,
    captioner: str,
    out: Path,
    *,
    as_json: bool,
) -> None:
    from dataclasses import asdict

    from d2i.corpora import build_corpus, found_splits
    from d2i.corpus_analysis.captioning import describe

    with closing(ProgressBar()) as progress:
        one_more = _counting(progress, "images captioned")

        def on_batch(num: int) -> None:
            for _ in range(num):
                one_more()

        summary = describe(
            build_corpus(name, config.corpus.options()),
            source,
            found_splits(name, source, config.corpus.options()),
            captioner,
            out,
            on_batch,
        )
    line = (
        f"{out}: {summary.num_described} images captioned now, {summary.num_there} before; "
        f"failed: {counted(summary.failures)}; use them with --set corpus.descriptions={out}"
    )
    print_result(asdict(summary) | {"descriptions": str(out)}, [line], as_json=as_json)


def _lines(survey: dict[str, Any]) -> Iterator[str]:
    yield f"licence: {survey['licence']}"
    for split, found in survey["splits"].items():
        yield (
            f"{split}: {found['num_instances']} instances of {found['num_images']} images in "
            f"{found['num_dialogs_with_images']} of {found['num_dialogs']} dialogs, "
            f"{found['num_turns']} turns; record issues: {counted(found['problems'])}"
        )
        for reason, first in found["first_problems"].items():
            yield f"  first {reason}: {first['where']}: {first['detail']}"
        if found["most_occurrences"] > _MANY_OCCURRENCES:
            yield (
                f"  one image is shared {found['most_occurrences']} times: all its instances go "
                "into one shard; --set corpus.repeated=unique keeps one"
            )
        yield from _length_lines(found["lengths"])
        yield from _variant_lines(found)
        if found["pictures"] and (found["pictures"]["num_read"] or found["pictures"]["failures"]):
            seen = found["pictures"]
            yield f"  images read: {seen['num_read']}; failed: {counted(seen['failures'])}"
    yield from _leak_lines(survey["leaks"])


def _length_lines(lengths: dict[str, Any]) -> Iterator[str]:
    if lengths["num_sampled"]:
        yield (
            f"  context length: {lengths['mean']:.0f} tokens on average, {lengths['longest']} at "
            f"most; {lengths['share_over']:.1%} exceed the {lengths['room']} that fit "
            f"(sample of {lengths['num_sampled']})"
        )


def _variant_lines(found: dict[str, Any]) -> Iterator[str]:
    """Describe the effect of each option; options without one are only on the page."""
    as_set = (found["num_instances"], found["lengths"]["mean"], found["lengths"]["share_over"])
    for variant in found["variants"]:
        if as_set == (variant["num_instances"], variant["mean_tokens"], variant["share_over"]):
            continue
        change = variant["num_instances"] - found["num_instances"]
        tokens = (
            f", {variant['mean_tokens']:.0f} tokens, {variant['share_over']:.1%} too long"
            if variant["mean_tokens"] is not None
            else ""
        )
        yield (
            f"    {variant['option']}={variant['value']}: {variant['num_instances']} instances "
            f"({change:+d}){tokens}"
        )


def _leak_lines(leaks: dict[str, Any]) -> Iterator[str]:
    if not leaks["counts"]:
        yield "leaks between splits: none"
    for count in leaks["counts"]:
        yield (
            f"leaks between splits: {count['num_instances']} instances of {count['split']} show "
            f"{count['num_images']} images of {count['other_split']} ({count['reason']})"
        )
    if not leaks["near"]:
        yield "near duplicates were not searched for: no image file was read"
