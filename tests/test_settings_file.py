"""Configuration files by path, and packaged ones by name."""

from pathlib import Path

import pytest

from stepfuse.configs import FOLDER
from stepfuse.data.settings_file import find_config
from stepfuse.train import config_path


@pytest.mark.parametrize("name", ["emoji-alignment", "dpo/emoji-alignment", "configs/dpo/emoji-alignment"])
@pytest.mark.parametrize("suffix", ["", ".yaml"])
def test_packaged_config_is_found_by_name_from_any_folder(tmp_path, monkeypatch, name, suffix):
    monkeypatch.chdir(tmp_path)
    assert find_config(name + suffix, "dpo") == FOLDER / "dpo" / "emoji-alignment.yaml"


@pytest.mark.parametrize("folder", ["dpo", "ddpo", "eval", "sets", "accelerate"])
def test_every_packaged_config_is_found_by_its_name(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    files = sorted((FOLDER / folder).glob("*.yaml"))
    assert files
    assert [find_config(f"{folder}/{file.stem}", folder) for file in files] == files


def test_file_of_the_user_wins_over_a_packaged_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("emoji-alignment", "configs/dpo/emoji-alignment.yaml"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("rank: 2\n")
        assert find_config(name, "dpo") == Path(name)


def test_folder_of_the_same_name_does_not_hide_a_packaged_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("dpo/emoji-alignment").mkdir(parents=True)
    assert find_config("dpo/emoji-alignment", "dpo") == FOLDER / "dpo" / "emoji-alignment.yaml"
    with pytest.raises(ValueError, match="'dpo' is a folder"):
        find_config("dpo", "dpo")


@pytest.mark.parametrize("name", ["dpo/emoji-alignmnt", "emoji-alignmnt", "configs/dpo/emoji_alignment.yaml"])
def test_wrong_name_lists_the_nearest_packaged_configs(name):
    with pytest.raises(ValueError, match="'dpo/emoji-alignment'") as error:
        find_config(name, "dpo")
    assert repr(name) in str(error.value)


def test_name_that_is_near_to_none_lists_them_all():
    with pytest.raises(ValueError, match="no config file 'zzz'") as error:
        find_config("zzz", "eval")
    assert all(f"eval/{file.stem}" in str(error.value) for file in (FOLDER / "eval").glob("*.yaml"))


@pytest.mark.parametrize("name", ["ddpo/emoji-compressibility", "configs/ddpo/emoji-compressibility.yaml"])
def test_config_of_another_command_is_not_taken(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="another command") as error:
        find_config(name, "dpo")
    assert repr(name) in str(error.value)
    assert "dpo/emoji-alignment" in str(error.value)


def test_path_of_a_packaged_config_is_printed_for_other_programs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config_path.main(["accelerate/multi-gpu"])
    assert Path(capsys.readouterr().out.strip()) == FOLDER / "accelerate" / "multi-gpu.yaml"
    config_path.main([])
    names = capsys.readouterr().out.split()
    assert {"accelerate/zero2", "dpo/emoji-alignment", "sets/emoji"} <= set(names)
    for wrong in ("accelerate/multi-gpus", "multi-gpu"):
        with pytest.raises(SystemExit) as end:
            config_path.main([wrong])
        assert "'accelerate/multi-gpu'" in end.value.code
