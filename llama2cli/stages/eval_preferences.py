"""`llama2 eval preferences`: what comparisons hold. Tables 6 and 26 of Llama 2."""

from __future__ import annotations

from dataclasses import dataclass

from llama2cli.settings import Measuring, flag


@dataclass(frozen=True, kw_only=True)
class Settings(Measuring):
    """What comparisons hold: how many, turns, tokens, shares of ratings and safety bins, by source and weekly batch.

    The tables are shaped as Tables 6 and 26 of the paper and go to stderr, the same as metric records to stdout. Pairs
    that nobody may learn from (the chosen answer is unsafe and the other safe, or both are the same) are left out and
    counted. Without a tokenizer words are counted. Of several files each is a source, where records name none.

    Example:
      llama2 eval preferences examples/data/preferences.jsonl --tokenizer tok.model -o metrics.jsonl
    """

    format: str = flag(default="auto", help="form of the records (auto: by their fields), as hh-rlhf, trl, pandalm")
    tokenizer: str | None = flag(
        default=None, help="tokenizer.model, or a folder that holds one, to count tokens with", complete="checkpoint"
    )


def run(settings: Settings) -> None:
    """Count record by record, then show and write."""
    from llama2cli.measure import flow, preferences
    from llama2cli.text.formats import read_comparisons
    from llama2cli.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(settings.tokenizer) if settings.tokenizer else None
    count = (lambda text: len(tokenizer.encode(text))) if tokenizer else (lambda text: len(text.split()))
    comparisons = read_comparisons(settings.files, format=settings.format, max_line=settings.max_line)
    records = (record for _, record in flow.watched(comparisons, settings.files, "comparisons"))
    found = preferences.collect(records, count, "tokens" if tokenizer else "words")
    inputs = [*settings.files, *([settings.tokenizer] if settings.tokenizer else [])]
    flow.deliver(settings, preferences.tables(found), preferences.records(found), inputs)
