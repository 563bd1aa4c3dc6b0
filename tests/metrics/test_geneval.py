"""GenEval: the published prompts by hash, every rule and border, and random scenes judged a second way."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from sprint_jax.core.errors import UserError
from sprint_jax.metrics import geneval
from sprint_jax.metrics.geneval import Detection
from sprint_jax.metrics.geneval_prompts import CLASSES, COLORS, make_prompts, to_lines

PUBLISHED = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"


def box(x, y, width=10.0, height=10.0, score=0.95):
    """A thing by its centre."""
    return Detection((x - width / 2, y - height / 2, x + width / 2, y + height / 2), score)


def test_prompts_are_the_published_ones():
    requests = make_prompts()
    assert len(requests) == 553 and len(CLASSES) == 80
    assert hashlib.sha256(to_lines(requests).encode()).hexdigest() == PUBLISHED
    tags = [request["tag"] for request in requests]
    assert [tags.count(tag) for tag in dict.fromkeys(tags)] == [80, 99, 80, 94, 100, 100]
    assert len(make_prompts(count=3)) == 18


# Offsets of a to b with boxes of 10 x 10: a margin of 2 on either axis, and more than half of the distance.
PLACES = [
    ((0, 0), set()),
    ((2, 0), set()),
    ((2.0005, 0), set()),
    ((4, 0), set()),
    ((4.01, 0), {"right of"}),
    ((-4.01, 0), {"left of"}),
    ((0, 4.01), {"below"}),
    ((0, -4.01), {"above"}),
    ((30, -30), {"right of", "above"}),
    ((30, 10), {"right of"}),
    ((-100, 120), {"left of", "below"}),
]


@pytest.mark.parametrize(("offset", "found"), PLACES)
def test_relations_and_their_margins(offset, found):
    a, b = box(50 + offset[0], 50 + offset[1]), box(50, 50)
    assert geneval.relations(a.box, b.box) == found


def ask(tag="x", include=(), exclude=()):
    return {"tag": tag, "prompt": "", "include": list(include), "exclude": list(exclude)}


def need(name, count=1, **more):
    return {"class": name, "count": count} | more


CAT, DOG = box(20, 20), box(80, 20)
LEFT = ask(include=[need("dog"), need("cat", position=["left of", 0])])
# Request, things, faults.
SCENES = [
    (ask(include=[need("cat")]), {"cat": [CAT]}, ()),
    (ask(include=[need("cat")]), {"dog": [DOG]}, (("missing", "cat", 0),)),
    (ask(include=[need("cat", 2)]), {"cat": [CAT]}, (("missing", "cat", 1),)),
    (ask(include=[need("cat", 1)]), {"cat": [CAT, DOG]}, ()),
    (ask(include=[need("cat", 2)], exclude=[need("cat", 3)]), {"cat": [CAT, DOG]}, ()),
    (
        ask(include=[need("cat", 2)], exclude=[need("cat", 3)]),
        {"cat": [CAT, DOG, box(50, 50)]},
        (("too many", "cat", 3),),
    ),
    (ask(exclude=[need("dog", 1)]), {}, ()),
    (ask(include=[need("cat", color="red")]), {"cat": [CAT]}, ()),
    (ask(include=[need("cat", color="red")]), {"cat": [DOG]}, (("color", "cat", ("blue",)),)),
    # Only the first one is looked at.
    (ask(include=[need("cat", color="red")]), {"cat": [DOG, CAT]}, (("color", "cat", ("blue",)),)),
    (
        ask(include=[need("cat", 2, color="red")]),
        {"cat": [CAT, DOG]},
        (("color", "cat", ("red", "blue")),),
    ),
    (LEFT, {"cat": [CAT], "dog": [DOG]}, ()),
    (LEFT, {"cat": [DOG], "dog": [CAT]}, (("position", "cat", ("right of",)),)),
    (LEFT, {"cat": [CAT], "dog": [CAT]}, (("position", "cat", ()),)),
    (LEFT, {"cat": [CAT]}, (("missing", "dog", 0), ("no target", "cat"))),
    (LEFT, {"dog": [DOG]}, (("missing", "cat", 0),)),
    (
        ask(include=[need("dog", 2), need("cat", position=["left of", 0])]),
        {"cat": [CAT], "dog": [DOG, box(0, 20)]},
        (("position", "cat", ("right of",)),),
    ),
    # A thing of the wrong colour is no target.
    (
        ask(include=[need("dog", color="red"), need("cat", position=["left of", 0])]),
        {"cat": [CAT], "dog": [DOG]},
        (("color", "dog", ("blue",)), ("no target", "cat")),
    ),
]


def paint(_, things):
    """Things in the left half are red, others blue."""
    return ["red" if thing.box[0] < 50 else "blue" for thing in things]


@pytest.mark.parametrize(("request_", "things", "faults"), SCENES)
def test_rules_by_hand_made_scenes(request_, things, faults):
    assert geneval.judge(request_, things, paint) == geneval.Verdict(not faults, faults)


def test_things_are_kept_by_confidence():
    scores = [0.3, 0.31, 0.9, 0.91, 0.29]
    things = {"cat": [box(i, 0, score=score) for i, score in enumerate(scores)]}
    things["dog"] = [box(0, 0, score=0.3)]
    kept = geneval.select(things, "colors")
    assert [each.score for each in kept["cat"]] == [0.91, 0.9, 0.31] and "dog" not in kept
    assert [each.score for each in geneval.select(things, "counting")["cat"]] == [0.91]
    many = {"cat": [box(i, 0, score=0.4 + i / 100) for i in range(20)]}
    places = [each.box[0] for each in geneval.select(many, "colors")["cat"]]
    assert places == [x - 5 for x in range(19, 3, -1)]


def second_opinion(request, things):
    """The rules again, in another form: boxes as centres and sizes, all conditions of an entry at once."""
    good, right = [], True
    for entry in request["include"]:
        found = things.get(entry["class"], [])[: entry["count"]]
        ok = len(found) == entry["count"]
        if "color" in entry:
            ok = ok and all(color == entry["color"] for color in paint(None, found))
        if ok and "position" in entry:
            relation, target = entry["position"]
            axis, sign = {
                "left of": (0, -1),
                "right of": (0, 1),
                "above": (1, -1),
                "below": (1, 1),
            }[relation]
            ok = good[target] is not None and all(
                clear(a.box, b.box, axis, sign) for a in found for b in good[target]
            )
        good.append(found if ok else None)
        right = right and ok
    return right and all(len(things.get(e["class"], [])) < e["count"] for e in request["exclude"])


def clear(a, b, axis, sign):
    gaps = [(a[k] + a[k + 2] - b[k] - b[k + 2]) / 2 for k in (0, 1)]
    sizes = [a[k + 2] - a[k] + b[k + 2] - b[k] for k in (0, 1)]
    beyond = sign * gaps[axis] - 0.1 * sizes[axis]
    return beyond >= 1e-3 and beyond > 0.5 * (gaps[0] ** 2 + gaps[1] ** 2) ** 0.5


def test_random_scenes_are_judged_alike_by_another_form_of_the_rules():
    random, seen = np.random.default_rng(0), []
    for _ in range(200):
        names = random.choice(["cat", "dog", "cup"], 2, replace=False)
        things = {
            name: [
                box(*random.uniform(0, 100, 2), *random.uniform(4, 40, 2))
                for _ in range(random.integers(4))
            ]
            for name in ("cat", "dog", "cup")
        }
        second = need(names[1], int(random.integers(1, 3)))
        if random.random() < 0.6:
            second["position"] = [str(random.choice(["left of", "right of", "above", "below"])), 0]
        first = need(names[0], int(random.integers(1, 3)))
        if random.random() < 0.3:
            first["color"] = str(random.choice(["red", "blue"]))
        request = ask(
            include=[first, second], exclude=[need(names[0], 3)] if random.random() < 0.3 else []
        )
        seen.append(second_opinion(request, things))
        assert geneval.judge(request, things, paint).correct == seen[-1]
    assert 20 < sum(seen) < 180


def test_colours_are_those_of_the_nearest_sentences_on_grey():
    picture = np.zeros((20, 30, 3), np.uint8)
    mask = np.zeros((20, 30), bool)
    mask[5:10, 5:15] = True
    thing = Detection((4.6, 4.4, 15.4, 10.0), 1.0, mask)
    cut = np.asarray(geneval.cut_out(Image.fromarray(picture), thing))
    assert cut.shape == (6, 10, 3) and set(np.unique(cut)) == {0, 0x99}
    text = np.stack([np.eye(10)[:3] + 4 * np.eye(10)[[k] * 3] for k in range(10)])
    classifier = geneval.color_classifier(text)
    assert classifier.shape == (10, 10) and np.linalg.norm(classifier, axis=1) == pytest.approx(1)
    assert [len(each) for each in geneval.color_sentences("cat")] == [3] * 10
    assert geneval.color_sentences("cat")[0][1] == "a photo of a red-colored cat"
    seventh = lambda x: np.eye(10)[[7] * len(x)]  # noqa: E731
    colors = geneval.make_colors(Image.fromarray(picture), seventh, lambda _: classifier)
    assert colors("cat", [thing, thing]) == [COLORS[7]] * 2


def test_results_are_read_judged_again_and_summed_up(tmp_path):
    request, path = LEFT | {"tag": "position"}, tmp_path / "results.jsonl"
    other = ask("counting", [need("cat")])
    rows = [(request, [0, 0, 9, 9, 0.9], True), (request, [200, 0, 209, 9, 0.9], False)]
    rows += [(other, [0, 0, 1, 1, 1], True)]
    lines = [
        {"filename": "x.png", "tag": r["tag"], "prompt": "", "correct": correct, "reason": ""}
        | {
            "metadata": json.dumps(r),
            "details": json.dumps({"cat": [where], "dog": [[100, 0, 110, 9, 0.8]]}),
        }
        for r, where, correct in rows
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = geneval.read_results(path)
    for result in results:
        assert geneval.judge(result.request, result.things, paint).correct == result.correct
    found = geneval.summarize((result.request, result.correct) for result in results)
    values = {name: each["value"] for name, each in found.items()}
    assert values == pytest.approx(
        dict(position=0.5, counting=1, overall=0.75, images=2 / 3, prompts=1)
    )
    for correct in ("false", 1, None):
        bad = [lines[0] | {"correct": correct}]
        path.write_text("".join(json.dumps(line) + "\n" for line in bad))
        with pytest.raises(UserError, match=r"results\.jsonl, line 1 .*not true or false"):
            geneval.read_results(path)
    lines[1].pop("details")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"results\.jsonl, line 2"):
        geneval.read_results(path)
