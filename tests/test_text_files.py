"""Text files: UTF-8 whatever the locale, without a byte order mark, lines that end at \\n or \\r\\n."""

import ast
import codecs
import csv
import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import stepfuse.data
from stepfuse.data.json_file import read_json
from stepfuse.data.prompts import load_prompts
from stepfuse.data.settings_file import load_settings, read_settings
from stepfuse.data.text_files import decode_text, file_name, find_file, printable, read_lines, read_text, write_text
from stepfuse.data.yaml_file import yaml_text
from stepfuse.rewards.image_files import pair_prompts
from stepfuse.rewards.registry import load_reward
from stepfuse.scripts.cli.main import main
from stepfuse.scripts.evaluation.config import EvaluationConfig
from stepfuse.train.arguments import parse_settings
from stepfuse.train.settings import DDPOSettings, DPOSettings
from tests.fixtures_tiny import refused

# What str.splitlines splits at besides \n and \r\n.
WITHIN = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"]


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_lines_end_at_line_feeds_only_and_a_byte_order_mark_is_no_text(mark, ending, tmp_path):
    file = tmp_path / "prompts.txt"
    lines = ["ein Fuchs für Zoë", "夜空の猫", *(f"a red{sign}fox" for sign in WITHIN)]
    file.write_bytes(mark + ending.join(lines).encode())
    assert read_lines(file) == load_prompts(str(file)) == lines
    file.write_bytes(mark + (ending.join(lines) + ending).encode())
    assert read_lines(file) == lines
    images = tmp_path / "images"
    images.mkdir()
    for i in range(len(lines)):
        Image.new("RGB", (2, 2)).save(images / f"{i}.png")
    assert [item.prompt for item in pair_prompts(images, file)] == lines


@pytest.mark.parametrize(
    ("content", "culprits"),
    [
        ("ein Fuchs\nfür Zoë".encode("latin-1"), ["0xfc", "position 11", "line 2", "UTF-8"]),
        (codecs.BOM_UTF8 + b"a\xff", ["0xff", "position 4", "line 1"]),
        ("a é".encode() + b"\n\xa9", ["0xa9", "position 5", "line 2"]),
        ("a fox".encode("utf-16"), ["UTF-16", "save it as UTF-8"]),
        (codecs.BOM_UTF16_BE + "a fox".encode("utf-16-be"), ["UTF-16"]),
        ("a fox".encode("utf-32"), ["UTF-32"]),
        ("a fox\nb".encode("utf-16-le"), ["NUL", "line 1"]),
        (b"a\nb\0", ["NUL", "line 2"]),
    ],
)
def test_what_is_no_utf8_text_is_refused_by_file_and_line(content, culprits, tmp_path):
    for name in ("a.txt", "a.csv", "a.yaml", "a.json"):
        (tmp_path / name).write_bytes(content)
    with refused("a.txt", *culprits):
        read_text(tmp_path / "a.txt")
    with refused("a.txt", *culprits):
        load_prompts(str(tmp_path / "a.txt"))
    with refused("a.csv", *culprits):
        pair_prompts(tmp_path, tmp_path / "a.csv")
    with refused("a.yaml", *culprits):
        read_settings(tmp_path / "a.yaml", DPOSettings)
    with refused("a.yaml", *culprits):
        load_reward(str(tmp_path / "a.yaml"))
    with refused("a.json", *culprits):
        read_json(tmp_path / "a.json", "an object")


def test_files_that_are_folders_missing_empty_or_of_old_macintoshes_are_named(tmp_path):
    with refused("gone.txt"):
        read_text(tmp_path / "gone.txt")
    with refused(str(tmp_path)):
        read_text(tmp_path)
    with refused(tmp_path.name, "folder"):
        load_prompts(str(tmp_path))
    for content in (b"", codecs.BOM_UTF8, b"\n \r\n"):
        (tmp_path / "empty.txt").write_bytes(content)
        with refused("empty.txt", "empty"):
            load_prompts(str(tmp_path / "empty.txt"))
    (tmp_path / "mac.txt").write_bytes(b"a fox\ra cat\r")
    with refused("mac.txt", "carriage return"):
        load_prompts(str(tmp_path / "mac.txt"))


def test_yaml_and_json_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.yaml").write_bytes(codecs.BOM_UTF8 + "objective_name: Zoë\r\nseed: 3\r\n".encode())
    parsed = parse_settings(DPOSettings, ["--config", str(tmp_path / "a.yaml")])
    assert (parsed.objective_name, parsed.seed) == ("Zoë", 3)
    (tmp_path / "a.json").write_bytes(codecs.BOM_UTF8 + '{"name": "Zoë"}'.encode())
    assert read_json(tmp_path / "a.json", "an object") == {"name": "Zoë"}


def test_a_table_may_have_a_byte_order_mark_and_lines_within_its_cells(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "für.png")
    prompts = ["ein\nFuchs", "a\u2028b", "c\r\nd\x0ce"]
    with open(tmp_path / "p.csv", "w", newline="", encoding="utf-8-sig") as handle:
        csv.writer(handle).writerows([("file_name", "prompt"), *(("für.png", prompt) for prompt in prompts)])
    assert [item.prompt for item in pair_prompts(tmp_path, tmp_path / "p.csv")] == prompts
    rows = "".join(f'{{"file_name": "für.png", "prompt": "a{sign}b"}}\r\n' for sign in WITHIN[:3])
    (tmp_path / "p.JSONL").write_bytes(codecs.BOM_UTF8 + rows.encode())
    assert [item.prompt for item in pair_prompts(tmp_path, tmp_path / "p.JSONL")] == [f"a{s}b" for s in WITHIN[:3]]


def test_what_is_written_is_utf8_with_line_feeds(tmp_path):
    write_text(tmp_path / "a.txt", "für\n夜\r\n")
    assert (tmp_path / "a.txt").read_bytes() == "für\n夜\r\n".encode()
    write_text(
        tmp_path / "a.txt", "caf\udce9 \udcc3\udcbc \ud800"
    )  # a byte that is no UTF-8, two that are, and no byte
    assert (tmp_path / "a.txt").read_bytes().decode().startswith("caf\\")


# Names of files


def latin_name(folder):
    """A folder with a picture whose name is not UTF-8, as another system may have written it."""
    file = os.fsencode(folder) + b"/caf\xe9.png"
    try:
        Image.new("RGB", (4, 4), "red").save(folder / "a.png")
        os.rename(folder / "a.png", file)
    except OSError:
        pytest.skip("this file system wants UTF-8")
    return Path(os.fsdecode(file))


def test_names_that_are_not_utf8_are_readable_in_messages_and_tables(tmp_path, capfd):
    images = tmp_path / "images"
    images.mkdir()
    file = latin_name(images)
    assert file_name(file.name) == printable(file.name) == "caf\\xe9.png"
    assert printable("f\udcc3\udcbcr") == "für"
    (tmp_path / "p.txt").write_text("a fox")
    main([*["reward", "score", "colourfulness", "--images"], str(images), "--prompts", str(tmp_path / "p.txt"),
          "--output", str(tmp_path / "scores.csv")])  # fmt: skip
    table = (tmp_path / "scores.csv").read_bytes().decode()
    assert table.splitlines()[1].startswith("caf\\xe9.png,a fox,")
    file.write_bytes(b"no picture")
    with pytest.raises(SystemExit) as error:
        main([*["reward", "score", "colourfulness", "--overwrite", "--images"], str(images), "--prompts",
              str(tmp_path / "p.txt"), "--output", str(tmp_path / "scores.csv")])  # fmt: skip
    assert "caf\\xe9.png" in str(error.value.code)
    os.rename(file, os.fsencode(tmp_path) + b"/caf\xe9.txt")
    prompts = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")
    assert load_prompts(prompts) == ["no picture"]
    Path(prompts).write_bytes(b"\xff")
    with refused("caf\\xe9.txt"):
        load_prompts(prompts)


def test_a_file_is_found_by_the_name_that_a_text_gives_it(tmp_path):
    (tmp_path / "für.png").write_bytes(b"")
    assert find_file(tmp_path, "für.png").exists()
    assert not find_file(tmp_path, "a\0b").exists()
    assert not find_file(tmp_path, "\udcff").exists()


# Numbers and words of YAML


@pytest.mark.parametrize("number", ["1e-5", "1E-5", "+1e-5", "0.1e-4", ".1e-4", "1.e-5", "10e-6"])
def test_a_number_with_an_exponent_is_a_number_in_every_yaml_file(number, tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(f"learning_rate: {number}\nreward_clip: [-1e5, 1E5]\n")
    for settings in (DPOSettings, DDPOSettings):
        parsed = parse_settings(settings, ["--config", str(file)])
        assert parsed.learning_rate == pytest.approx(1e-5)
        assert parsed.reward_clip == [-100000, 100000]
        assert settings(**read_settings(file, settings)).learning_rate == pytest.approx(1e-5)
    file.write_text(f"guidance_scale: {number}\nscales: {{alignment: {number}}}\n")
    config = load_settings(file, EvaluationConfig)
    assert (config.guidance_scale, config.scales["alignment"]) == (pytest.approx(1e-5), pytest.approx(1e-5))
    file.write_text(f"reward: colourfulness\nscale: {number}\n")
    assert load_reward(str(file)).shaping.scale == pytest.approx(1e-5)
    file.write_text("seed: 012\nrank: +8\nmax_train_steps: 1_000\nobjective_name: 12:30:00\nprompts: 2024-01-01\n")
    parsed = DPOSettings(**read_settings(file, DPOSettings))
    assert (parsed.seed, parsed.rank, parsed.max_train_steps) == (12, 8, 1000)
    assert (parsed.objective_name, parsed.prompts) == ("12:30:00", "2024-01-01")


def test_yes_no_on_and_off_are_words_where_texts_are_and_booleans_where_those_are(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPFUSE_A_WORD", "")
    file = tmp_path / "a.yaml"
    file.write_text(
        "compile: no\nguidance: off\nmixed_precision: no\noverwrite: yes\nallow_tf32: On\nasync_scoring: off\n"
        "validation_prompts: [yes, Off]\nobjective_name: on\nenv: {STEPFUSE_A_WORD: on}\n"
    )
    parsed = parse_settings(DPOSettings, ["--config", str(file)])
    assert (parsed.compile, parsed.guidance, parsed.mixed_precision) == ("no", "off", "no")
    assert (parsed.overwrite, parsed.allow_tf32, parsed.async_scoring) == (True, True, False)
    assert (parsed.validation_prompts, parsed.objective_name) == (["yes", "Off"], "on")
    assert os.environ["STEPFUSE_A_WORD"] == "on"
    file.write_text("guidance: off\nrules: [{rule: product, label: no}]")
    values = read_settings(file, EvaluationConfig)
    assert values == {"guidance": "off", "rules": [{"rule": "product", "label": False}]}  # of no type: as before


def test_settings_that_are_written_are_read_as_they_were(tmp_path):
    """Texts that are numbers, booleans or null in YAML 1.1 or 1.2 among them, and lines that only other readers end."""
    looks = [
        "1e5",
        "-1E-3",
        ".5e1",
        "0o17",
        "0x1f",
        "012",
        "1_000",
        "yes",
        "null",
        "~",
        "",
        "2024-01-01",
        "1:30",
        "a: b",
    ]
    texts = [*looks, "<<", "- a", "# a", "'", *(f"a{sign}b" for sign in (*WITHIN, "\n", "\r", "\t", "\ufeff", "夜"))]
    settings = DPOSettings(
        objective_name="1e5", learning_rate=1e-5, lora_alpha=None, reward_clip=[-1e-7, 1e300], validation_prompts=texts
    )
    write_text(tmp_path / "a.yaml", yaml_text(dataclasses.asdict(settings)))
    assert parse_settings(DPOSettings, ["--config", str(tmp_path / "a.yaml")]) == settings


@pytest.mark.parametrize(
    ("text", "culprits"),
    [
        ("seed: 1\nrank: 4\nseed: 2\n", ["line 3", "'seed'", "twice"]),
        ("env:\n  A: 1\n  A: 2\n", ["line 3", "'A'"]),
        ("seed:\n\t1\n", ["line 2"]),
        ("seed: [1\n", ["YAML"]),
        ("seed: 1\n---\nrank: 2\n", ["line 2"]),
        ("seed: !!python/name:os.system ''\n", ["line 1"]),
        ("[" * 3000, ["YAML"]),
        ("seed: &a [*a]", ["itself"]),
        (f"seed: {'9' * 5000}", ["line 1", "long"]),
        ("- seed", ["name: value"]),
        ("", ["name: value"]),
        ("learning_rate: 1e-5x", ["learning_rate"]),
    ],
)
def test_yaml_that_cannot_be_meant_is_one_line(text, culprits, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with refused(*culprits):
        DPOSettings(**read_settings(tmp_path / "a.yaml", DPOSettings))


def test_a_merged_mapping_may_be_overridden(tmp_path):
    (tmp_path / "a.yaml").write_text("scales: {a: &a {x: 1, y: 2}, b: {<<: *a, x: 3}}\n")
    assert read_settings(tmp_path / "a.yaml", EvaluationConfig)["scales"]["b"] == {"x": 3, "y": 2}


# Everywhere


def python_files():
    root = Path(stepfuse.data.__file__).parents[1]
    folders = (root / name for name in ("configs", "data", "fuse", "rewards", "scripts", "train"))
    return [file for folder in folders for file in folder.rglob("*.py")]


@pytest.mark.parametrize("file", python_files(), ids=lambda file: file.stem)
def test_no_file_is_opened_as_text_without_its_encoding(file):
    for node in ast.walk(ast.parse(file.read_bytes())):
        if not isinstance(node, ast.Call):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        method = isinstance(node.func, ast.Attribute)
        owner = getattr(getattr(node.func, "value", None), "id", "") if method else ""
        encoding = any(keyword.arg == "encoding" for keyword in node.keywords)
        if method and called in ("read_text", "write_text"):
            assert encoding, f"{file}:{node.lineno}"
        if called in ("open", "fdopen") and owner not in ("Image", "tarfile", "os", "zipfile", "gzip"):
            mode = next((str(a.value) for a in node.args[1:2] if isinstance(a, ast.Constant)), "")
            network = any(keyword.arg == "timeout" for keyword in node.keywords)
            assert encoding or "b" in mode or network, f"{file}:{node.lineno}"


@pytest.fixture
def locales(tmp_path):
    """Environments in which Python's own encoding is not UTF-8."""
    found = [dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")]
    target = tmp_path / "locales" / "en_US.ISO-8859-1"
    target.parent.mkdir()
    if shutil.which("localedef"):
        made = subprocess.run(["localedef", "-i", "en_US", "-f", "ISO-8859-1", target], capture_output=True)
        if made.returncode == 0:
            found.append(dict(LC_ALL=target.name, LOCPATH=str(target.parent), PYTHONUTF8="0"))
    return found


PROGRAM = """
import locale
from dataclasses import dataclass
from pathlib import Path
from stepfuse.data.prompts import load_prompts
from stepfuse.data.settings_file import read_settings
from stepfuse.data.text_files import note, print_any_text, write_text

@dataclass
class Settings:
    prompts: str

print_any_text()
assert locale.getencoding().upper() != "UTF-8", locale.getencoding()
prompts = load_prompts("p.txt")
assert prompts == ["ein Fuchs f\\xfcr Zo\\xeb", "\\u591c\\u7a7a\\u306e\\u732b"], ascii(prompts)
assert read_settings(Path("a.yaml"), Settings) == {"prompts": "f\\xfcr.txt"}
write_text(Path("out.txt"), prompts[1])
print(*prompts)
note(prompts[1])
"""
PICTURES = """
from stepfuse.rewards.image_files import pair_prompts

items = pair_prompts(Path("images"), Path("p.csv"))
assert [(item.name, item.prompt) for item in items] == [("f\\xfcr.png", "Zo\\xeb")], ascii(items)
assert [item.name for item in pair_prompts(Path("images"), Path("one.txt"))] == ["f\\xfcr.png"]
"""


def test_prompts_settings_tables_and_names_are_utf8_in_any_locale_and_print_in_each(tmp_path, locales):
    (tmp_path / "p.txt").write_bytes("ein Fuchs für Zoë\n夜空の猫\n".encode())
    (tmp_path / "one.txt").write_bytes(b"a fox")
    (tmp_path / "a.yaml").write_bytes("prompts: für.txt\n".encode())
    (tmp_path / "p.csv").write_bytes("file_name,prompt\nfür.png,Zoë\n".encode())
    (tmp_path / "images").mkdir()
    Image.new("RGB", (2, 2)).save(os.fsdecode(os.fsencode(tmp_path / "images") + "/für.png".encode()))
    for environment in locales:
        program = PROGRAM + PICTURES if environment is locales[-1] else PROGRAM  # these import torch
        ran = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, env=os.environ | environment, capture_output=True
        )
        assert ran.returncode == 0, ran.stderr.decode(errors="replace")
        assert b"\\u591c" in ran.stdout
        assert (tmp_path / "out.txt").read_bytes().decode() == "夜空の猫"


def test_text_that_is_decoded_keeps_what_splits_no_line():
    assert decode_text(b"a\rb\x0c", "x") == "a\rb\x0c"
