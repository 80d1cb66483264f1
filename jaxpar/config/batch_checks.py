"""Problems of the sizes of a batch: how many sequences, and how long they are."""

from __future__ import annotations

from collections.abc import Iterator

from jaxpar.config.errors import must_be_multiple
from jaxpar.config.keys import TP_OVERLAP_PIECES, Actor, Data, Model, Runner

MAX_SLOTS = 2**18  # microbatches * stages * chunks: a schedule is a table with a place for each


def batch_problems(runner: Runner, actor: Actor, dp: int | None) -> Iterator[str]:
    micro, total = actor.micro_batch_size, actor.global_batch_size
    if runner.enable_dynamic_batch_size:
        if not total:
            yield "actor.global_batch_size: not given: set the number of documents in an optimizer step"
        elif dp and total < dp:
            yield (
                f"actor.global_batch_size: {total} documents are fewer than dp = {dp} ranks, so some ranks would have "
                f"none: choose at least {dp}"
            )
        yield from _table_problems(actor, total // (dp or 1))
        return
    for key, value, unit in (("micro", micro, "a microbatch"), ("global", total, "an optimizer step")):
        if not value:
            yield f"actor.{key}_batch_size: not given: set the number of sequences in {unit}"
    if micro and total:
        yield from must_be_multiple(
            "actor.global_batch_size", total, [("micro_batch_size", micro)] + ([] if dp is None else [("dp", dp)])
        )
        yield from _table_problems(actor, total // (micro * (dp or 1)))


def _table_problems(actor: Actor, microbatches: int) -> Iterator[str]:
    model = actor.model
    pp, chunks = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size or 1
    if microbatches * pp * chunks > MAX_SLOTS:
        yield (
            f"actor.global_batch_size: {actor.global_batch_size} makes {microbatches:,} microbatches on {pp} stages with {chunks} "
            f"chunks = {microbatches * pp * chunks:,} places in the schedule, more than {MAX_SLOTS:,}: lower it, or raise the "
            "microbatch"
        )


def data_problems(runner: Runner, data: Data) -> Iterator[str]:
    if runner.enable_dynamic_batch_size and not data.reset_attention_mask:
        yield (
            "data.reset_attention_mask: False, but runner.enable_dynamic_batch_size puts documents into a row by their "
            "lengths, so that those before a document tell nothing about it: remove one of the two"
        )


def row_problems(runner: Runner, model: Model) -> Iterator[str]:
    """Problems of the length of a row."""
    yield from (_budget_problems if runner.enable_dynamic_batch_size else _sequence_problems)(runner, model)


def _budget_problems(runner: Runner, model: Model) -> Iterator[str]:
    key, budget = "runner.max_tokens_per_mbs", runner.max_tokens_per_mbs
    if budget is None:
        yield (
            f"{key}: not given, but runner.enable_dynamic_batch_size needs it: set the number of tokens in a "
            "microbatch on each cp rank, so that max_tokens_per_mbs * context_parallel_size holds the longest document"
        )
        return
    factors = [("2", 2)] if model.context_parallel_size > 1 else []  # as in _sequence_problems
    factors += _sequence_parallel_factors(model)
    yield from must_be_multiple(key, budget, factors)


def _sequence_problems(runner: Runner, model: Model) -> Iterator[str]:
    seq = runner.seq_length
    if not seq:
        yield "runner.seq_length: not given: set the number of tokens in a sequence"
        return
    factors: list[tuple[str, int]] = []
    if model.context_parallel_size > 1:  # each rank has an early and a late chunk, to balance causal work
        factors += [("2", 2), ("context_parallel_size", model.context_parallel_size)]
    factors += _sequence_parallel_factors(model)
    yield from must_be_multiple("runner.seq_length", seq, factors)
    if model.seq_length not in (None, seq):
        yield (
            f"actor.model.seq_length: {model.seq_length} differs from runner.seq_length {seq}: remove it, or set it to "
            "${runner.seq_length}"
        )


def _sequence_parallel_factors(model: Model) -> Iterator[tuple[str, int]]:
    if model.sequence_parallel:
        yield "tensor_model_parallel_size", model.tensor_model_parallel_size
    if model.tp_comm_overlap:
        yield "the pieces of tp_comm_overlap", TP_OVERLAP_PIECES
