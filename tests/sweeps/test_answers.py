"""Answers in a store: what goes in comes out, once, all or nothing; other things are refused in one line."""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_answers import answer_of, set_of, sets_of
from sweep_processes import DYING

import tokenprune as tp
from tokenprune.errors import InputError, OptionError
from tokenprune.sweeps.answer_sets import Answer, AnswerSet
from tokenprune.sweeps.answer_summary import mean_score, summarised_answers
from tokenprune.sweeps.answers import store_answers, stored_scores
from tokenprune.sweeps.merge import merge
from tokenprune.sweeps.store import FILE, reading, writing

pytestmark = pytest.mark.usefixtures("fakes")

SWEEP: dict[str, Any] = {"models": "fake", "datasets": "rectangles", "strategies": ["whole", "front"], "limit": 4}
PER_CONFIGURATION = ("model", "dataset", "split", "protocol", "strategy", "label", "budget", "seed", "run")

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
names = text.filter(bool)
numbers = st.floats(0, 1e15) | st.integers(0, 2**53)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(text, inner, max_size=2),
    max_leaves=4,
)


def answer_with(tokens: int, share: float, **fields: Any) -> Answer:
    return Answer(image_tokens=tokens, equivalent_tokens=share * tokens, layers=[0, int(share * tokens)], **fields)


answers = st.builds(
    answer_with,
    tokens=st.integers(0, 2**53),
    share=st.floats(0, 1),
    sample=names,
    text=st.none() | text,
    answer=st.none() | text,
    target=st.none() | text,
    ran=st.none() | text,
    other_tokens=st.none() | st.integers(0, 2**53),
    flops=st.none() | numbers,
    flops_by_part=st.dictionaries(text, numbers, max_size=2),
    flops_unpruned=st.none() | numbers.filter(lambda found: found >= 1),
    kv_bytes=st.none() | numbers,
    milliseconds=st.dictionaries(text, numbers, max_size=2),
    metrics=st.dictionaries(text, plain, max_size=3),
)
sets = st.builds(
    AnswerSet,
    model=names,
    dataset=names,
    split=text,
    protocol=text,
    strategy=names,
    label=names,
    given=st.dictionaries(text, plain, max_size=2),
    budget=st.none() | st.floats(0, 1, exclude_min=True),
    seed=st.integers(0, 2**32 - 1),
    run=text,
    environment=st.dictionaries(text, plain, max_size=2),
    scores=st.dictionaries(
        names,
        st.fixed_dictionaries(
            {"value": st.floats(-1e30, 1e30), "stderr": st.none() | numbers},
            optional={"higher_is_better": st.booleans()},
        ),
        max_size=3,
    ),
    answers=st.lists(answers, min_size=1, max_size=3, unique_by=lambda one: one.sample),
)


# what goes in ---------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(one=sets)
def test_what_is_stored_is_read(one: AnswerSet) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert store_answers(folder, one) == len(one.answers)
        assert store_answers(folder, json.loads(one.model_dump_json())) == 0
        table = tp.read_answers(folder)
        assert len(table) == len(one.answers)
        by_sample = {row["sample"]: row for row in table.to_dict("records")}
        for answer in one.answers:
            row = by_sample[answer.sample]
            expected = {**answer.model_dump(), **{name: getattr(one, name) for name in PER_CONFIGURATION}}
            found = {name: None if row[name] != row[name] else row[name] for name in expected}
            assert found == expected
            assert json.loads(row["given"]) == one.given
        with reading(folder) as store:
            ((environment,),) = store.rows("SELECT value FROM environments")
        assert json.loads(environment) == one.environment
        scores = {metric: (count, score) for found in stored_scores(folder).values() for count, metric, score in found}
        assert scores == {metric: (len(one.answers), score) for metric, score in one.scores.items()}


def test_a_set_may_grow(tmp_path: Path) -> None:
    """As with lmms-eval's --limit: the score of more answers is that of more answers."""
    small = {**set_of(count=3), "scores": {"accuracy": {"value": 0.5}}}
    assert store_answers(tmp_path, small) == 3
    assert store_answers(tmp_path, set_of(count=6, run="second")) == 3
    assert store_answers(tmp_path, small) == 0
    (line,) = summarised_answers(tmp_path)
    assert (line.answers, line.scores["accuracy"].estimate.value) == (6, 0.75)
    assert tp.read_answers(tmp_path).run.tolist() == ["first"] * 3 + ["second"] * 3


def test_a_score_of_other_answers_does_not_count(tmp_path: Path) -> None:
    """Of two halves the mean is taken; a metric that is not a number in each answer has none."""
    first, second = ([answer_of(number) for number in part] for part in (range(4), range(4, 8)))
    store_answers(tmp_path, [set_of(answers=first, run="1"), set_of(answers=second, run="2")])
    (line,) = summarised_answers(tmp_path)
    assert line.answers == 8
    assert [*line.scores] == ["exact_match"]
    expected = mean_score([float(number % 3 > 0) for number in range(8)])
    assert line.scores["exact_match"] == expected
    assert (expected.estimate.value, expected.stderr) == (0.625, pytest.approx(0.18298126))


def test_lines_of_one_label_are_those_of_what_was_given(tmp_path: Path) -> None:
    """The same label for other options, another budget or another strategy is not the same line."""
    other: list[dict[str, Any]] = [{"given": {"layer": 2}}, {"given": {"layer": 8}}, {"budget": 0.7}, {"strategy": "x"}]
    for number, change in enumerate(other):
        known = {**set_of("fastv", 0.5), **change, "scores": {"accuracy": {"value": number / 4}}}
        store_answers(tmp_path, known)
    lines = summarised_answers(tmp_path)
    assert sorted(line.scores["accuracy"].estimate.value for line in lines) == [0, 0.25, 0.5, 0.75]
    assert [line.answers for line in lines] == [6] * 4


def test_seeds_of_a_sample_are_not_independent(tmp_path: Path) -> None:
    for seed in range(5):
        store_answers(tmp_path, set_of(count=4, seed=seed, scores={}))
    (line,) = summarised_answers(tmp_path)
    assert (line.answers, line.samples) == (4, {"0", "1", "2", "3"})
    assert line.scores["exact_match"] == mean_score([float(number % 3 > 0) for number in range(4)])


def test_another_score_of_the_same_answers_is_refused(tmp_path: Path) -> None:
    """Whatever run it is from; and a metric has one direction on a dataset."""
    store_answers(tmp_path, set_of())
    with pytest.raises(InputError, match="score 'accuracy' is another in"):
        store_answers(tmp_path, set_of(run="second", scores={"accuracy": {"value": 0.1}}))
    turned = {"accuracy": {"value": 0.5, "higher_is_better": False}}
    with pytest.raises(InputError, match="the direction of score 'accuracy' is another in"):
        store_answers(tmp_path, set_of("fastv", 0.5, scores=turned))
    assert len(tp.read_answers(tmp_path)) == 6


def test_numbers_of_a_line(tmp_path: Path) -> None:
    store_answers(tmp_path, sets_of())
    lines = summarised_answers(tmp_path)
    assert [line.label for line in lines] == [
        *("none", "fastv at 0.25", "fastv at 0.5", "visionzip at 0.25", "visionzip at 0.5"),
    ]
    line = lines[2]
    assert (line.image_tokens, line.equivalent_tokens, line.tokens_ratio) == (64, 32, 0.5)
    assert line.flops_ratio == pytest.approx(0.5)
    accuracy, total = line.scores["accuracy"], line.scores["total"]
    assert (accuracy.estimate.value, accuracy.stderr) == (0.375, 0.05)
    assert accuracy.estimate.interval == pytest.approx((0.375 - 1.959964 * 0.05, 0.375 + 1.959964 * 0.05))
    assert (total.estimate.value, total.stderr, total.estimate.interval) == (1512.25, None, None)


def test_what_cannot_be_counted_is_not_known(tmp_path: Path) -> None:
    unknown = [answer_of(0), answer_of(1, flops=None, metrics={"exact_match": 10**400})]
    store_answers(tmp_path, set_of(answers=unknown))
    (line,) = summarised_answers(tmp_path)
    assert line.flops_ratio is None
    assert "exact_match" not in line.scores


# what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answers": []}, "answers: found .*at least 1"),
        ({"answers": [answer_of(0), answer_of(0)]}, "answers: sample '0' occurs twice"),
        ({"answers": [answer_of(0), {"sample": "1"}]}, "answers.1.answer is missing; 2 more"),
        ({"answers": [answer_of(0, image_tokens="many")]}, "answers.0.image_tokens: found 'many', but .*valid integer"),
        ({"answers": [answer_of(0, image_tokens=True)]}, "answers.0.image_tokens: found True"),
        ({"answers": [answer_of(0, image_tokens=2**63)]}, "answers.0.image_tokens: found 9223372036854775808"),
        ({"answers": [answer_of(0, flops=float("nan"))]}, "answers.0.flops: found nan, but .*finite"),
        ({"answers": [answer_of(0, metrics={"x": float("inf")})]}, "answers.0.metrics.x.*found inf, but .*finite"),
        ({"answers": [answer_of(0, metrics={"x": {"y": "\udce9"}})]}, r"answers.0.metrics: its text holds \\udce9"),
        ({"answers": [answer_of(0, answer="\udce9")]}, r"answers.0.answer: its text holds \\udce9"),
        ({"answers": [answer_of(0, milliseconds={"\udce9": 1.0})]}, r"its text holds \\udce9"),
        ({"answers": [answer_of(0, colour="red")]}, "unknown field 'answers.0.colour'"),
        ({"scores": {"accuracy": {"value": float("nan")}}}, "scores.accuracy.value: found nan"),
        ({"scores": {"accuracy": {"value": 1.0, "stderr": -1.0}}}, "scores.accuracy.stderr: found -1.0"),
        ({"scores": {"accuracy": {"value": 1e308}}}, "scores.accuracy.value: found 1e\\+308"),
        ({"answers": [answer_of(0, flops=1e308)]}, "answers.0.flops: found 1e\\+308"),
        ({"answers": [answer_of(0, flops_unpruned=5e-324)]}, "answers.0.flops_unpruned: found 5e-324"),
        ({"answers": [answer_of(0, equivalent_tokens=65.0)]}, "answers.0: 65 tokens in a layer, but 64 image tokens"),
        ({"answers": [answer_of(0, layers=[64, 65])]}, "answers.0: 65 tokens in a layer"),
        ({"answers": [answer_of(0, layers=[-5])]}, "answers.0.layers.0: found -5"),
        ({"answers": [answer_of(0, layers=[10**5000])]}, "answers.0.layers.0"),
        ({"budget": 35.0}, "budget: found 35.0"),
        ({"model": ""}, "model: found ''"),
        ({"label": None}, "label: found None"),
    ],
)
def test_wrong_fields_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=f"^set of answers: .*{words}") as found:
        store_answers(tmp_path / "run", {**set_of(), **change})
    assert "\n" not in str(found.value)
    with pytest.raises(OptionError, match=r"^set 1 of answers: "):
        store_answers(tmp_path / "run", [set_of(), {**set_of(), **change}])
    assert not (tmp_path / "run").exists()


def test_other_things_than_sets_are_refused(tmp_path: Path) -> None:
    for junk in (5, "answers", [None]):
        with pytest.raises(OptionError, match="found, expected an AnswerSet"):
            store_answers(tmp_path / "run", junk)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="no answers found"):
        store_answers(tmp_path / "run", [])
    assert not (tmp_path / "run").exists()


def test_another_answer_is_refused_with_all_that_comes_with_it(tmp_path: Path) -> None:
    store_answers(tmp_path, set_of())
    before = tp.read_answers(tmp_path)
    other = set_of(answers=[answer_of(8), answer_of(3, answer="maybe")])
    for wrong in (
        [set_of("fastv", 0.5), other],
        [set_of("fastv", 0.5), set_of("fastv", 0.5, scores={}, answers=[answer_of(1)])],
    ):
        with pytest.raises(
            InputError, match=r"(none|fastv at 0.5) with some-model on questions: sample '(3|1)' is another in"
        ):
            store_answers(tmp_path, wrong)
        assert tp.read_answers(tmp_path).equals(before)
    with pytest.raises(InputError, match="score 'accuracy' is another in"):
        store_answers(tmp_path, set_of(scores={"accuracy": {"value": 0.1}}))
    assert tp.read_answers(tmp_path).equals(before)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with writing(tmp_path), pytest.raises(InputError, match="is being written by another process"):
        store_answers(tmp_path, set_of())


def test_values_that_are_damaged(tmp_path: Path) -> None:
    statements = (
        "UPDATE answers SET metrics = '{'",
        "UPDATE answers SET flops = 'x'",
        "UPDATE scores SET value = 'x'",
        "UPDATE answers SET equivalent_tokens = 'abc'",
        "UPDATE answers SET equivalent_tokens = 9e999",
        "UPDATE answers SET image_tokens = 'some'",
        "UPDATE answers SET metrics = '[1]'",
        "UPDATE answers SET layers = '{}'",
        "UPDATE configurations SET given = 'nope'",
        "UPDATE configurations SET given = '[1]'",
        "DELETE FROM configurations",
    )
    for number, statement in enumerate(statements):
        run = tmp_path / str(number)
        store_answers(run, set_of())
        with sqlite3.connect(run / FILE) as connection:
            connection.execute(statement)
        connection.close()
        with pytest.raises(InputError, match=r"results.sqlite' is damaged \(.*\); keep a copy"):
            summarised_answers(run)


# beside a sweep -------------------------------------------------------------------------------------------------------


def test_beside_the_records_of_a_sweep(tmp_path: Path) -> None:
    tp.sweep(SWEEP, tmp_path / "run")
    records = tp.read_results(tmp_path / "run", every=True)
    assert tp.read_answers(tmp_path / "run").empty
    store_answers(tmp_path / "run", sets_of())
    assert tp.read_results(tmp_path / "run", every=True).equals(records)
    again = tp.sweep(SWEEP, tmp_path / "run")
    assert (again.added, again.records, again.answers) == (0, 8, 30)
    store_answers(tmp_path / "first", sets_of())
    assert tp.read_results(tmp_path / "first").empty
    assert tp.sweep(SWEEP, tmp_path / "first").added == 8
    assert tp.read_answers(tmp_path / "first").equals(tp.read_answers(tmp_path / "run"))
    both = {"model", "dataset", "split", "protocol", "strategy", "label", "given", "budget", "seed", "sample", "text"}
    both |= {"image_tokens", "equivalent_tokens", "layers", "flops", "flops_by_part", "kv_bytes", "milliseconds"}
    both |= {"metrics", "environment", "configuration"}
    table = tp.read_answers(tmp_path / "run")
    assert {*table} & {*records} == both
    for name in both:
        assert type(table[name][0]) is type(records[name][0]), name


def old_store(run: Path) -> Path:
    """As the release before answers made it."""
    with sqlite3.connect(run / FILE) as connection:
        connection.executescript("DROP TABLE answers; DROP TABLE scores; PRAGMA user_version = 2;")
    connection.close()
    return run


def test_a_store_from_before_answers(tmp_path: Path) -> None:
    tp.sweep(SWEEP, tmp_path / "run")
    records = tp.read_results(tmp_path / "run")
    content = (old_store(tmp_path / "run") / FILE).read_bytes()
    assert tp.read_results(tmp_path / "run").equals(records)
    assert tp.read_answers(tmp_path / "run").empty
    assert summarised_answers(tmp_path / "run") == []
    assert merge([tmp_path / "run"], tmp_path / "all").records == len(records)
    assert (tmp_path / "run" / FILE).read_bytes() == content
    shutil.copytree(tmp_path / "run", tmp_path / "swept")
    assert tp.sweep(SWEEP, tmp_path / "swept").added == 0
    for run in ("run", "swept"):
        assert store_answers(tmp_path / run, set_of()) == 6
        assert tp.read_results(tmp_path / run).equals(records)
        assert len(tp.read_answers(tmp_path / run)) == 6


# merged, killed -------------------------------------------------------------------------------------------------------


def test_merged_stores(tmp_path: Path) -> None:
    tp.sweep(SWEEP, tmp_path / "masks")
    store_answers(tmp_path / "one", sets_of())
    store_answers(tmp_path / "two", [set_of(count=9), set_of(dataset="others")])
    found = merge([tmp_path / name for name in ("masks", "one", "two")], tmp_path / "all")
    assert (found.records, found.answers, found.added_answers) == (8, 39, 39)
    again = merge([tmp_path / "two", tmp_path / "one"], tmp_path / "all")
    assert (again.added, again.answers, again.added_answers) == (0, 39, 0)
    table = tp.read_answers(tmp_path / "all")
    assert not table.duplicated(["configuration", "sample"]).any()
    alone = tp.read_answers(tmp_path / "one")
    part = table[(table.dataset == "questions") & (table.label != "none")].reset_index(drop=True)
    assert part.equals(alone[alone.label != "none"].reset_index(drop=True))
    assert summarised_answers(tmp_path / "all")[0].scores["accuracy"].estimate.value == 0.75


def test_merged_stores_that_differ(tmp_path: Path) -> None:
    store_answers(tmp_path / "one", set_of())
    store_answers(tmp_path / "two", set_of(answers=[answer_of(2, answer="maybe")]))
    store_answers(tmp_path / "three", set_of(scores={"accuracy": {"value": 0.1}}))
    for other, what in (("two", "sample '2'"), ("three", "score 'accuracy'")):
        out = tmp_path / f"all-{other}"
        with pytest.raises(InputError, match=f"{other}': none with some-model on questions: {what} is another than"):
            merge([tmp_path / "one", tmp_path / other], out)
        assert len(tp.read_answers(out)) == 6


PROGRAM = (
    DYING.rpartition("from tokenprune")[0]
    + """
import json
from tokenprune.sweeps.answers import store_answers
store_answers(sys.argv[1], json.load(open(sys.argv[2])))
"""
)


def test_a_killed_writer_leaves_all_or_nothing(tmp_path: Path) -> None:
    (tmp_path / "sets.json").write_text(json.dumps([set_of(count=20), set_of("fastv", 0.5, count=20)]))
    ran = []
    for dying in (4, 40, 60, 10**6):  # while the tables are made; in the first set, in the second one, never
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(dying), tmp_path / "run", tmp_path / "sets.json"], capture_output=True
        )
        assert done.returncode == (0 if dying == 10**6 else -signal.SIGKILL), done.stderr
        try:
            ran.append(len(tp.read_answers(tmp_path / "run")))
        except InputError as error:  # not even tables
            assert "holds no results of a sweep" in str(error)  # noqa: PT017 - one of two good ends
            ran.append(0)
    assert ran == [0, 0, 0, 40]
