"""Dynamic batches: guarantees of the planner for many length distributions, and the loader. Needs no device."""

import dataclasses
import itertools
import json
import pickle

import numpy as np
import pytest

from jaxpar.data import (
    BatchOrder,
    DataError,
    DocumentCost,
    DocumentSource,
    build_dynamic_loader,
    build_loader,
    dynamic_loader,
    load_tokenizer,
)
from jaxpar.data.cache import token_cache
from jaxpar.data.dynamic import plan_rows, row_counts

COST = DocumentCost(per_token=6 * 8.0e9, per_pair=6.0 * 32 * 4096)  # that of Llama-3-8B
BUDGET = 1000


def log_normal(rng, number, median=120, sigma=1.0):
    return np.clip(rng.lognormal(np.log(median), sigma, number).astype(int), 1, BUDGET)


DISTRIBUTIONS = {
    "log-normal": log_normal,
    "uniform": lambda rng, number: rng.integers(1, BUDGET + 1, number),
    "one a row": lambda rng, number: rng.integers(BUDGET // 2 + 1, BUDGET + 1, number),
    "tiny": lambda rng, number: rng.integers(0, 4, number),  # 0: nothing to predict
    "exactly the budget": lambda rng, number: np.full(number, BUDGET),
    "thirds": lambda rng, number: np.full(number, BUDGET // 3 + 1),  # two fit in a row; three just do not
    "one long": lambda rng, number: np.append(rng.integers(1, 20, number - 1), BUDGET),
}


def assert_keeps_its_promises(plan, lengths, num_ranks):
    assert sorted(itertools.chain(*itertools.chain(*plan.rows))) == list(range(len(lengths)))  # none lost or doubled
    assert [len(rows) for rows in plan.rows] == [plan.num_rows] * num_ranks
    assert plan.num_rows in row_counts(-(-len(lengths) // num_ranks))
    tokens = np.array([[lengths[row].sum() for row in rows] for rows in plan.rows])
    assert tokens.max() <= BUDGET
    np.testing.assert_allclose(plan.padding_fraction, 1 - tokens.sum() / (BUDGET * tokens.size), atol=1e-12)
    rank_lengths = [lengths[list(itertools.chain(*rows))].astype(float) for rows in plan.rows]
    costs = [(n * COST.per_token + n * n * COST.per_pair).sum() for n in rank_lengths]
    if sum(costs):
        np.testing.assert_allclose(plan.balance, max(costs) / (sum(costs) / num_ranks), rtol=1e-9)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_no_document_is_lost_or_doubled_and_no_row_overflows(name):
    rng = np.random.default_rng(0)
    for _ in range(60):
        number, num_ranks = int(rng.integers(1, 80)), int(rng.choice([1, 2, 3, 8]))
        lengths = DISTRIBUTIONS[name](rng, number)
        assert_keeps_its_promises(plan_rows(lengths, BUDGET, num_ranks, COST), lengths, num_ranks)


def test_a_document_over_the_budget_is_named():
    with pytest.raises(ValueError, match="document 2 has 1001 tokens, more than the 1000 in a row"):
        plan_rows(np.array([5, BUDGET, BUDGET + 1, 7]), BUDGET, 2, COST)


def test_rows_are_few():
    assert plan_rows(np.full(12, BUDGET), BUDGET, 4, COST).num_rows == 3
    assert plan_rows(np.full(40, BUDGET // 5), BUDGET, 4, COST).num_rows == 2
    assert plan_rows(np.array([600, 600, 400, 400]), BUDGET, 2, COST).padding_fraction == 0
    assert plan_rows(np.full(60, BUDGET // 3 + 1), BUDGET, 2, COST).num_rows == 15


def test_numbers_of_rows_are_a_few_that_waste_less_than_an_eighth():
    assert list(row_counts(1)) == [1]
    assert list(row_counts(40)) == [*range(1, 17), *range(18, 33, 2), 36, 40]
    counts = list(row_counts(4096))
    assert len(counts) == 16 + 8 * 8
    assert all(below + 1 > 7 / 8 * above for below, above in itertools.pairwise(counts))


def test_the_order_of_documents_does_not_change_what_a_plan_costs():
    lengths = log_normal(np.random.default_rng(1), 100)
    plan, other = (plan_rows(a, BUDGET, 4, COST) for a in (lengths, lengths[::-1].copy()))
    assert (plan.num_rows, plan.padding_fraction) == (other.num_rows, other.padding_fraction)
    np.testing.assert_allclose(plan.balance, other.balance, atol=1e-4)


def test_cost_is_quadratic_up_to_a_sliding_window():
    lengths = np.array([0, 1, 10, 100])
    assert DocumentCost(2, 3)(lengths).tolist() == [0, 5, 320, 30200]
    assert DocumentCost(2, 3, window=10)(lengths).tolist() == [0, 5, 320, 3200]


@pytest.mark.parametrize(
    ("documents", "dp", "budget", "limit"),
    [(256, 2, 8192, 0.05), (256, 8, 8192, 0.1), (1024, 8, 16384, 0.1), (1024, 32, 16384, 0.15)],
)
def test_balance_and_padding_on_log_normal_lengths(documents, dp, budget, limit):
    """Prints the README's figures (with -s). Lengths have median 600 and sigma 1, clipped to the budget; 20 steps."""
    rng = np.random.default_rng(0)
    steps = [np.clip(rng.lognormal(np.log(600), 1.0, documents).astype(int), 1, budget) for _ in range(20)]
    plans = [plan_rows(lengths, budget, dp, COST) for lengths in steps]
    balance, padding = ([getattr(plan, name) for plan in plans] for name in ("balance", "padding_fraction"))
    in_order = [(c := COST(lengths).reshape(dp, -1).sum(1)).max() / c.mean() for lengths in steps]
    unpacked = [1 - lengths.mean() / lengths.max() for lengths in steps]
    print(
        f"\n{documents} documents a step, dp {dp}, rows of {budget} tokens, {sorted({p.num_rows for p in plans})} a rank: "
        f"balance {np.mean(balance):.3f}, at worst {max(balance):.3f} (documents in order: {np.mean(in_order):.2f}, "
        f"{max(in_order):.2f}); padding {np.mean(padding):.1%}, at worst {max(padding):.1%} (one a row, as long as the "
        f"longest: {np.mean(unpacked):.0%})"
    )
    for lengths, found in zip(steps, balance, strict=True):
        costs = COST(lengths)
        assert found <= 1.02 * max(1, costs.max() / (costs.sum() / dp))  # a document is not split over ranks
    assert np.mean(padding) < limit


def test_exchanges_even_out_what_four_documents_a_rank_leave_uneven():
    rng = np.random.default_rng(0)
    excess = []
    for _ in range(10):
        lengths = np.clip(rng.lognormal(np.log(600), 0.5, 64).astype(int), 1, 2048)
        costs = COST(lengths)
        excess.append(plan_rows(lengths, 2048, 16, COST).balance / max(1, costs.max() / (costs.sum() / 16)))
    assert np.mean(excess) < 1.015


# The loader


def write_documents(folder, lengths, seed=0):
    """Writes texts of the given lengths in tokens: one per byte, because the end of the document is predicted too."""
    rng = np.random.default_rng(seed)
    texts = ["".join(map(chr, rng.integers(97, 123, length))) for length in lengths]
    path = folder / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path, texts


def open_documents(folder, lengths, budget):
    path, texts = write_documents(folder, lengths)
    cache = token_cache([path], tokenizer=load_tokenizer(None), cache_dir=folder / "cache")
    return DocumentSource(cache, budget), texts


def texts_in(batch) -> list[str]:
    """Decodes every document in a batch's rows, and checks targets, masks, segments and positions of its tokens."""
    texts = []
    for row in range(len(batch["tokens"])):
        tokens, targets, mask, segments, positions = (
            batch[key][row] for key in ("tokens", "targets", "loss_mask", "segment_ids", "positions")
        )
        used = int((segments > 0).sum())
        assert not np.concatenate([a[used:] for a in (tokens, targets, mask, segments, positions)]).any()
        for segment in range(1, segments.max() + 1):
            (places,) = np.nonzero(segments == segment)
            np.testing.assert_array_equal(np.diff(places), 1)
            np.testing.assert_array_equal(positions[places], np.arange(len(places)))
            assert mask[places].all()
            np.testing.assert_array_equal(targets[places[:-1]], tokens[places[1:]])
            assert targets[places[-1]] == 256
            texts.append(bytes(tokens[places].tolist()).decode())
    return texts


class Numbers:
    def __init__(self, number):
        self.number = number

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        return {"number": np.array([index])}


ORDER = BatchOrder(12, seed=5, num_epochs=2)


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    lengths = np.clip(np.random.default_rng(3).lognormal(2.5, 0.8, 50).astype(int), 1, 64)
    return open_documents(tmp_path_factory.mktemp("documents"), [*lengths, 64], 64)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("dp", [1, 2, 4])
def test_every_layout_has_the_documents_of_the_packed_loaders_order_in_each_step(documents, dp, shuffle):
    source, texts = documents
    order = dataclasses.replace(ORDER, shuffle=shuffle)
    loaders = [
        build_dynamic_loader(source, order, dp=dp, ranks=ranks, cost=COST) for ranks in ([0], range(1, dp)) if ranks
    ]
    expected = build_loader(Numbers(len(source)), order)
    for batches in zip(expected, *loaders, strict=True):
        numbers = batches[0]["number"].ravel()
        rows = {len(batch["tokens"]) // ranks for batch, ranks in zip(batches[1:], (1, dp - 1), strict=False)}
        assert rows == {loaders[0].figures["num_microbatches"]}
        found = [text for batch in batches[1:] for text in texts_in(batch)]
        assert sorted(found) == sorted(texts[number] for number in numbers)
    assert loaders[0].num_batches == 2 * 51 // 12


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_position_leads_to_the_same_batches(documents, num_workers):
    source, _ = documents
    options = {"dp": 2, "ranks": [0, 1], "cost": COST}
    loader = build_dynamic_loader(source, ORDER, **options)
    expected = [(batch, loader.figures) for batch in loader]
    resumed = build_dynamic_loader(source, ORDER, num_workers=num_workers, **options)
    resumed.set_state({"batch": 3})
    for batch, figures in expected[3:]:
        found = next(resumed)
        assert resumed.figures == figures and found.keys() == batch.keys()
        assert all(np.array_equal(found[key], batch[key]) and found[key].dtype == batch[key].dtype for key in batch)
    resumed.close()
    assert figures.keys() == {"num_microbatches", "dp_balance", "padding_fraction", "flops_per_token"}
    assert type(figures["num_microbatches"]) is int


def test_workers_get_the_name_of_the_corpus_and_not_the_corpus(documents):
    assert len(pickle.dumps(documents[0])) < 500


@pytest.mark.parametrize("chunk", [1 << 20, 3])
def test_documents_over_the_budget_are_named_before_training(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(dynamic_loader, "_CHUNK", chunk)
    source, _ = open_documents(tmp_path, [3, 8, 5], budget=8)
    assert source.lengths(np.arange(3)).tolist() == [3, 8, 5]
    with pytest.raises(DataError) as caught:
        open_documents(tmp_path, [3, 8, 0, 9, 5, *[10] * 12], budget=8)
    problems = caught.value.problems
    assert f"{tmp_path / 'documents.jsonl'}, record 4 has 10 tokens, of which 9 are inputs" in problems[0]
    assert "max_tokens_per_mbs * context_parallel_size = 8" in problems[0]
    assert "record 6 has 11 tokens" in problems[1]
    assert len(problems) == 11 and problems[-1] == "and 3 more documents"


def test_records_are_counted_in_each_file(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("x" * 5)
    (tmp_path / "data" / "b.txt").write_text("x" * 20)
    options = {"tokenizer": load_tokenizer(None), "cache_dir": tmp_path / "cache"}
    with pytest.raises(DataError, match=r"b\.txt, record 1 has 21 tokens"):
        DocumentSource(token_cache([tmp_path / "data"], **options), 10)
    with pytest.raises(DataError, match=r"python:pydoc_data\.topics, record \d+ has"):
        DocumentSource(token_cache(["python:pydoc_data.topics"], **options), 10_000)


def test_too_few_documents(documents):
    with pytest.raises(DataError, match="actor.global_batch_size: 52 is more than the 51 documents"):
        build_dynamic_loader(documents[0], BatchOrder(52, seed=0), dp=1, ranks=[0], cost=COST)
