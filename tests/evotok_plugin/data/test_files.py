"""Paths, patterns, suffixes and the files of folders."""

import logging
import os
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from evotok_plugin.data.bad_samples import shorten
from evotok_plugin.data.files import (
    described,
    distinct_names,
    file_state,
    is_hidden,
    kind_of,
    list_folder,
    local_path,
    matching_files,
    read_file,
    refuse_compressed,
    report_skipped,
    stamp_of,
    suffix_of,
)
from evotok_plugin.errors import UserError


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def matches(folder, pattern):
    return [path.relative_to(folder).as_posix() for path in matching_files(f"{folder}/{pattern}")]


# Suffixes and hidden names -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((f"x{suffix}", "image") for suffix in (".jpg", ".JPEG", ".jfif", ".tif", ".TIFF", ".gif", ".ppm", ".avif")),
        *(("x.TAR", "tar"), ("x.Parquet", "parquet"), ("x.JSON", "json"), ("x.jsonl", "json")),
        *(("x.json.gz", "compressed"), ("x.tgz", "compressed"), ("x.ZIP", "compressed"), ("x.txt", ""), ("x", "")),
    ],
)
def test_the_suffix_determines_the_kind_of_a_file_in_any_case(name, kind):
    assert kind_of(name) == kind


def test_compressed_files_are_rejected():
    with pytest.raises(UserError, match=r"'a.tar.gz' is compressed \(.tar.gz\).*unpack it first"):
        refuse_compressed([Path("b.tar"), Path("a.tar.gz")])
    assert suffix_of("A.JSON.GZ") == ".json.gz" and suffix_of("a.b.PNG") == ".png" and suffix_of("a") == ""


@pytest.mark.parametrize(
    "name", ["._a.jpg", ".hidden/a.jpg", "a/.ipynb_checkpoints/b.jpg", "__MACOSX/a.jpg", "Thumbs.db"]
)
def test_files_created_by_systems_and_tools_are_hidden(name):
    assert is_hidden(name) and not is_hidden("./a/../b.c.jpg")


# Folders -----------------------------------------------------------------------------------------------------


def test_a_folder_is_listed_by_kind_and_other_files_are_counted(tmp_path):
    write(tmp_path, "a.JPG", "sub/b.tif", "sub/c.tar", "d.tar", "e.txt", "f", "._a.jpg", "@eaDir/a.jpg", "g.tar.gz")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "dead.png").symlink_to("nowhere")
    listing = list_folder(tmp_path, deep=("image",), flat=("tar",))
    assert listing.files == {"image": ["a.JPG", "sub/b.tif"], "tar": ["d.tar"]}
    assert listing.others == {
        ".tar": 1, ".txt": 1, "": 1, ".tar.gz": 1, "special file": 1, "broken link": 1,
    }  # fmt: skip


def test_links_and_loops_list_every_file_once_under_its_real_path(tmp_path):
    write(tmp_path, "z/real/a.jpg", "z/b.jpg")
    (tmp_path / "a_link").symlink_to("z/real")
    (tmp_path / "z" / "up").symlink_to("..")
    (tmp_path / "self").symlink_to("self")
    outside = write(tmp_path.with_name(f"{tmp_path.name}_outside"), "c.jpg")
    (tmp_path / "elsewhere").symlink_to(outside)
    listing = list_folder(tmp_path, deep=("image",))
    assert listing.files["image"] == ["elsewhere/c.jpg", "z/b.jpg", "z/real/a.jpg"]
    assert listing.others == {"broken link": 1}


def test_skipped_files_are_reported_in_one_line(caplog):
    with caplog.at_level(logging.WARNING):
        report_skipped("photos", Counter({".txt": 5, ".tif": 2}))
        report_skipped("photos", Counter())
        report_skipped("s.tar", Counter({"": 1}), "member")
    assert caplog.messages == [
        "photos: 7 files skipped: 2 .tif, 5 .txt",
        "s.tar: 1 member skipped: 1 without suffix",
    ]
    assert described(Counter({f".{n:02d}": 1 for n in range(14)})).endswith("1 .09 and 4 more kinds")
    assert described(Counter({"broken link": 2})) == "2 broken links" and described(Counter()) == "no files"


# Paths -------------------------------------------------------------------------------------------------------


def test_existing_paths_take_precedence_over_patterns(tmp_path):
    write(tmp_path, "data[v2].json", "datav.json", "x{1..2}*/a.tar", "x1/b.tar", "d[1]/s-0.tar", "d[1]/s-1.tar")
    assert matches(tmp_path, "data[v2].json") == ["data[v2].json"]
    assert matches(tmp_path, "data[v].json") == ["datav.json"]
    assert matches(tmp_path, "x{1..2}*/*.tar") == ["x{1..2}*/a.tar"]
    assert matches(tmp_path, "d[1]/s-{0..1}.tar") == ["d[1]/s-0.tar", "d[1]/s-1.tar"] == matches(tmp_path, "d[1]/*.tar")
    assert matches(tmp_path, "x1/") == ["x1"] and matches(tmp_path, "absent*") == []


def test_braces_list_ranges_and_alternatives_that_must_exist(tmp_path):
    write(tmp_path, "a00.tar", "a01.tar", "b.tar")
    assert matches(tmp_path, "{a00,b}.tar") == ["a00.tar", "b.tar"]
    assert matches(tmp_path, "a{00..01}.tar") == ["a00.tar", "a01.tar"]
    assert matches(tmp_path, "c{00..02}.tar") == []
    with pytest.raises(UserError, match="1 of its files do not exist; first: .*a02.tar"):
        matches(tmp_path, "a{00..02}.tar")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_unicode_normal_forms_are_equivalent(tmp_path, form):
    name = unicodedata.normalize(form, "été/ñ.json")
    write(tmp_path, name)
    for other in ("NFC", "NFD"):
        assert matches(tmp_path, unicodedata.normalize(other, name)) == [name]


def test_home_folders_and_file_urls_are_converted_to_paths(tmp_path, monkeypatch):
    write(tmp_path, "a b.json")
    monkeypatch.setenv("HOME", str(tmp_path))
    for spec in ("~/a b.json", f"file://{tmp_path}/a%20b.json", f"file://localhost{tmp_path}/a%20b.json"):
        assert matching_files(spec) == [tmp_path / "a b.json"]
    for spec in ("https://example.org/a.json", "s3://bucket/a.json", "file://host/a.json"):
        with pytest.raises(UserError, match="only local files are read"):
            matching_files(spec)


@pytest.mark.parametrize("spec", [".", "./", "../{name}"])
def test_the_working_folder_can_be_given_relatively(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(write(tmp_path, "a.json"))
    (found,) = matching_files(spec.format(name=tmp_path.name))
    assert found.samefile(tmp_path) and matching_files("./a.json") == [Path("a.json")]


def test_pipes_are_rejected_by_name_and_skipped_in_patterns(tmp_path, caplog):
    write(tmp_path, "a.json")
    os.mkfifo(tmp_path / "p.json")
    with pytest.raises(UserError, match="p.json' is a pipe or a device"):
        matches(tmp_path, "p.json")
    assert matches(tmp_path, "*.json") == ["a.json"] and "1 file skipped: 1 special file" in caplog.text


def test_files_with_equal_names_get_distinct_names():
    assert distinct_names([Path("x/0.tar"), Path("x/1.tar")]) == ["0", "1"]
    assert distinct_names([Path("d/x/0.tar"), Path("d/y/0.tar")]) == ["x/0", "y/0"]
    assert distinct_names([Path("0.tar"), Path("0.TAR")]) == ["0.tar", "0.TAR"]


# Content -----------------------------------------------------------------------------------------------------


def test_only_regular_files_are_read(tmp_path):
    assert read_file(write(tmp_path, "a") / "a") == b"a"
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(UserError, match="cannot be read: it is a folder, a pipe or a device"):
            read_file(path)
    for path in (tmp_path / "absent", tmp_path / "a" / "b"):
        with pytest.raises(UserError, match="does not exist"):
            read_file(path)


@pytest.mark.parametrize(
    "call",
    [
        read_file,
        local_path,
        matching_files,
        lambda name: local_path(f"https://{name}"),
        lambda name: local_path(f"file://{name}"),
        lambda name: matching_files(f"{{exists,{name}}}"),
        lambda name: refuse_compressed([Path(f"{name}.gz")]),
    ],
)
def test_messages_shorten_long_names(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exists").touch()
    try:
        call("a" * 100_000)
    except UserError as error:
        assert len(str(error)) < 800


def test_the_error_for_an_unreadable_file_quotes_its_name_once():
    with pytest.raises(UserError) as caught:
        read_file("a" * 100_000)
    assert str(caught.value).count("aaaa" * 20) == 1 and "cannot be read: File name too long" in str(caught.value)


def test_a_replaced_file_of_the_same_size_and_time_has_another_state(tmp_path):
    file = write(tmp_path, "a") / "a"
    before = file_state(file)
    file.write_text("b")
    os.utime(file, ns=(before[1], before[1]))
    after = file_state(file)
    assert after[:2] == before[:2] and after != before and file_state(tmp_path / "absent") == ()


def test_a_stamp_consists_of_location_and_state():
    one, moved, changed = stamp_of("a", 1), stamp_of("b", 1), stamp_of("a", 2)
    assert len(one) == 16 and one[:8] == changed[:8] and one[8:] == moved[8:] and len({one, moved, changed}) == 3


def test_quoted_values_are_short():
    assert shorten("a'b") == '"a\'b"' and shorten(7) == "7"
    assert len(shorten("x" * 3_000_000)) < 140 and "3000000 characters" in shorten("x" * 3_000_000)
    assert len(shorten({"a": ["x" * 1000] * 100})) < 140 and "1000 bytes" in shorten(b"x" * 1000)
