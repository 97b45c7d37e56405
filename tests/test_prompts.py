"""Sets of prompts by name: the colour prompts and their split, counts, names, and those of the hub."""

import os
import re
from collections import Counter

import pytest

from stepfuse.data.colours import COLOURS, OBJECTS, colour_prompts
from stepfuse.data.prompts import load_prompts
from stepfuse.data.quoted_words import CARRIERS, TEXTS, quoted_word_prompts
from tests.fixtures_tiny import refused

# Colour prompts.

Pair = tuple[str, str]


def pairs(prompt: str) -> list[Pair]:
    """The (colour, object) pairs of "A green dog and a red car.", read back from the text alone."""
    assert re.fullmatch(r"An? \w+ \w+( and an? \w+ \w+)?\.", prompt), prompt
    return re.findall(r"[Aa]n? (\w+) (\w+)", prompt)


def occurrences(held_out: bool) -> Counter[Pair]:
    return Counter(pair for prompt in colour_prompts(held_out=held_out) for pair in pairs(prompt))


def test_no_colour_of_an_object_is_in_both_splits_alone_or_in_company():
    trained, held_out = occurrences(False), occurrences(True)
    assert trained.keys() & held_out.keys() == set()
    assert trained.keys() | held_out.keys() == {(colour, thing) for colour in COLOURS for thing in OBJECTS}


def test_every_object_holds_out_two_of_ten_colours_and_every_colour_four_of_twenty_objects():
    assert (len(set(COLOURS)), len(set(OBJECTS))) == (10, 20)
    for held_out, colours_each, objects_each in ((True, 2, 4), (False, 8, 16)):
        found = occurrences(held_out)
        assert Counter(thing for _, thing in found) == dict.fromkeys(OBJECTS, colours_each)
        assert Counter(colour for colour, _ in found) == dict.fromkeys(COLOURS, objects_each)


def test_every_pair_is_prompted_for_once_alone_four_times_first_and_four_times_second():
    # 10 × 20 pairs, a fifth held out: 40 × (1 + 4) and 160 × (1 + 4) prompts.
    for held_out, size in ((True, 200), (False, 800)):
        prompts = colour_prompts(held_out=held_out)
        assert len(prompts) == len(set(prompts)) == size
        found = [pairs(prompt) for prompt in prompts]
        alone = Counter(pair for pair, *others in found if not others)
        first = Counter(both[0] for both in found if len(both) == 2)
        second = Counter(both[1] for both in found if len(both) == 2)
        assert alone == dict.fromkeys(occurrences(held_out), 1)
        assert first == second == dict.fromkeys(occurrences(held_out), 4)


def test_two_objects_of_a_prompt_differ_in_kind_and_colour_and_come_in_one_order():
    for held_out in (True, False):
        company = [both for prompt in colour_prompts(held_out=held_out) if len(both := pairs(prompt)) == 2]
        assert all(one[0] != other[0] and one[1] != other[1] for one, other in company)
        assert len({frozenset(both) for both in company}) == len(company)


def test_orange_is_the_one_colour_that_takes_an_an():
    text = " ".join(colour_prompts(held_out=False) + colour_prompts(held_out=True)).lower()
    assert set(re.findall(r"\ban (\w+)", text)) == {"orange"}
    assert set(re.findall(r"\ba (\w+)", text)) == set(COLOURS) - {"orange"}


def test_prompts_of_both_splits_follow_from_the_diagonals():
    # The diagonal of (colour j, object i) is (i + j) mod 10; 0 and 5 are held out. Red is colour 0 and yellow 2; the
    # bird is object 0, the dog 2, the car 6.
    assert "A red bird." in colour_prompts(held_out=True)  # 0 + 0
    assert "A yellow dog." in colour_prompts(held_out=False)  # 2 + 2
    # Blue is 4 and black 8: 4 + 6 = 10 and 8 + 2 = 10, and the car stands 4 behind the dog.
    assert "A black dog and a blue car." in colour_prompts(held_out=True)
    # Orange is 1 and purple 5: 1 + 6 = 7 and 5 + 2 = 7.
    assert "A purple dog and an orange car." in colour_prompts(held_out=False)


@pytest.mark.parametrize("name", ["colours", "colours-heldout"])
@pytest.mark.parametrize("count", [40, 64, 100, 128])
def test_some_of_the_colour_prompts_have_every_object_and_colour_and_a_fifth_of_one_object(name, count):
    found = [pairs(prompt) for prompt in load_prompts(f"{name}:{count}")]
    assert {colour for both in found for colour, _ in both} == set(COLOURS)
    assert {thing for both in found for _, thing in both} == set(OBJECTS)
    assert abs(sum(len(both) == 1 for both in found) - count / 5) < 1


# Texts to be written.


def test_every_text_is_on_every_carrier_and_in_one_split():
    # 40 texts, every fifth held out: 32 × 12 and 8 × 12 prompts.
    texts = {}
    for held_out, size in ((True, 96), (False, 384)):
        found = [re.fullmatch(r'(.*) "(.*)"\.', prompt).groups() for prompt in quoted_word_prompts(held_out=held_out)]
        assert len(found) == len(set(found)) == size
        texts[held_out] = {text for _, text in found}
        assert {carrier for carrier, _ in found} == set(CARRIERS)
    assert texts[True] | texts[False] == set(TEXTS)
    assert texts[True] & texts[False] == set()
    assert 'A wooden sign that says "Route 66".' in load_prompts("quoted-words-heldout")  # number 4 from 0


@pytest.mark.parametrize("count", [24, 32, 48])
def test_some_of_the_prompts_with_texts_have_every_text_and_most_carriers(count):
    prompts = load_prompts(f"quoted-words-heldout:{count}")
    assert len({prompt.split('"')[1] for prompt in prompts}) == 8
    assert len({prompt.split('"')[0] for prompt in prompts}) >= 10


# Names and counts.


def test_colour_and_dpok_prompts_have_names():
    assert load_prompts("colours") == colour_prompts(held_out=False)
    assert load_prompts("colours-heldout") == colour_prompts(held_out=True)
    # arXiv:2305.16381.
    assert load_prompts("dpok") == [
        "A green colored rabbit.",
        "A cat and a dog.",
        "Four wolves in the park.",
        "A dog on the moon.",
    ]


@pytest.fixture
def ten(tmp_path, monkeypatch):
    """A folder to be in, with a file of the prompts "0" to "9"."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ten").write_text("\n".join("0123456789"))
    return tmp_path


def test_a_count_takes_prompts_evenly_spaced_and_in_order(ten):
    assert load_prompts("ten:1") == ["0"]
    assert load_prompts("ten:2") == ["0", "5"]
    assert load_prompts("ten:4") == ["0", "2", "5", "7"]  # 0, 2.5, 5, 7.5
    assert load_prompts("ten:10") == load_prompts("ten") == list("0123456789")
    assert load_prompts("dpok:2") == ["A green colored rabbit.", "Four wolves in the park."]
    held_out = load_prompts("emoji-heldout")
    assert load_prompts("emoji-heldout:64")[:3] == [held_out[0], held_out[9], held_out[18]]  # 586 / 64 = 9.16


def test_a_file_whose_name_looks_like_a_count_is_a_file(ten):
    for name in ("a:3", "dpok:2", "dpok:x"):
        (ten / name).write_text("a cat\na dog\n")
        assert load_prompts(name) == ["a cat", "a dog"]
    assert load_prompts("a:3:1") == ["a cat"]


def test_counts_that_cannot_be_met_are_named(ten):
    with refused("'dpok:5'", "at most 4"):
        load_prompts("dpok:5")
    with refused("'ten:11'", "at most 10"):
        load_prompts("ten:11")
    for count in ("0", "-1", "x", "1.5", "", " 2"):
        with refused(f"'dpok:{count}'", "positive integer"):
            load_prompts(f"dpok:{count}")


def test_unknown_names_are_answered_with_all_names_and_the_nearest():
    names = ("emoji", "emoji-heldout", "colours", "colours-heldout", "dpok", "partiprompts", "pick-a-pic")
    for wrong, right in {
        "emojis": "emoji",
        "colors": "colours",
        "parti-prompts": "partiprompts",
        "pickapic:64": "pick-a-pic",
        "colours-held-out:8": "colours-heldout",
    }.items():
        with refused(repr(wrong.split(":")[0]), *names, f"did you mean {right!r}"):
            load_prompts(wrong)


# The hub.

HUB = {  # name: data set, split, column, and how many prompts it should hold
    "partiprompts": ("nateraw/parti-prompts", "train", "Prompt", 1632),
    "pick-a-pic": ("sayakpaul/pick-a-pic-v2-unique-prompts", "train", "prompt", 58960),
    "pick-a-pic-heldout": ("yuvalkirstain/pickapic_v2_no_images", "test_unique", "caption", 500),
}
FILES = {"unigenbench": ("CodeGoat24/UniGenBench", "train", "prompt_en", 600)}  # of one file among others


@pytest.mark.parametrize("name", HUB)
def test_sets_of_the_hub_are_read_from_their_split_and_column(name, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub_id, split, column, _ = HUB[name]
    rows = {column: ["a cat", "", None, "a dog", "a fox", "a hen"], "image": [b"not a picture"] * 6}
    folder = tmp_path / "hub" / "data"  # its files as the hub names them: splits are found by that
    folder.mkdir(parents=True)
    for which, kept in (split, 6), ("validation", 1):
        part = datasets.Dataset.from_dict({key: values[:kept] for key, values in rows.items()})
        part.cast_column("image", datasets.Image()).to_parquet(folder / f"{which}-00000-of-00001.parquet")
    load = datasets.load_dataset

    def from_folder(path, **keywords):
        assert path == hub_id
        return load(str(folder.parent), **keywords)

    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    assert load_prompts(name) == ["a cat", "a dog", "a fox", "a hen"]  # those bytes are never decoded
    assert load_prompts(f"{name}:2") == ["a cat", "a fox"]
    # What is a small part of its data set is streamed: nothing else is fetched, and nothing kept.
    assert any((tmp_path / "cache").rglob("*.arrow")) == (name != "pick-a-pic-heldout")


def test_unigenbench_is_read_from_its_english_file_at_one_commit(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub" / "eval").mkdir(parents=True)
    (tmp_path / "hub" / "eval" / "test_en.csv").write_text('index,prompt_en\n0,"two pandas, one hat"\n1,a gardener\n')
    (tmp_path / "hub" / "eval" / "test_zh.csv").write_text("index,prompt_zh\n0,熊猫\n")
    load, revisions = datasets.load_dataset, []

    def from_folder(path, *, revision, **keywords):
        assert path == "CodeGoat24/UniGenBench"
        revisions.append(revision)
        return load(str(tmp_path / "hub"), **keywords)

    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    assert load_prompts("unigenbench") == ["two pandas, one hat", "a gardener"]
    assert re.fullmatch("[0-9a-f]{40}", revisions[0])


@pytest.mark.parametrize("name", [*HUB, *FILES])
def test_a_hub_that_is_not_reached_is_said_in_a_line(name, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    if os.environ.get("HF_HUB_OFFLINE") != "1":
        pytest.skip("the hub may be there")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with refused((HUB | FILES)[name][0], "Hub"):
        load_prompts(name)
    with refused(f"{name}:0", "positive integer"):  # found without the hub
        load_prompts(f"{name}:0")


@pytest.mark.network
@pytest.mark.parametrize("name", [*HUB, *FILES])
def test_sets_of_the_hub_are_there(name):
    prompts = load_prompts(name)
    assert len(prompts) == (HUB | FILES)[name][3]
    assert all(prompt.strip() and len(prompt) < 2000 for prompt in prompts[:3])


@pytest.mark.network
def test_no_prompt_of_pick_a_pic_is_in_both_splits():
    assert set(load_prompts("pick-a-pic")) & set(load_prompts("pick-a-pic-heldout")) == set()
