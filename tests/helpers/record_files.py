"""Conversations about small gray images, written as files of every supported format."""

import io
import json
import tarfile

from PIL import Image


def png(value):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(buffer, "png")
    return buffer.getvalue()


def turns(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def row(number):
    """Reading, drawing and text-only rows in turn; the text contains characters that are special in JSON."""
    kinds = [turns("<image>\nwhat?", f"a {number}"), turns(f"draw {number}", "<image>"), turns('say "}]\\"', "{[ä\n")]
    image = {} if number % 3 == 2 else {"image": f"{number:02d}.png"}
    return {"id": f"r{number}", **image, "conversations": kinds[number % 3]}


ROWS = [row(number) for number in range(12)]


def write_shard(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def as_json(folder, rows):
    (folder / "d.json").write_text(json.dumps(rows, indent=1))
    return folder / "d.json"


def as_jsonl(folder, rows):
    (folder / "d.jsonl").write_text("\n".join(json.dumps(one, ensure_ascii=False) for one in rows) + "\n\n")
    return folder / "d.jsonl"


def as_shards(folder, rows):
    for shard in range(0, len(rows), 5):
        members = []
        for number, one in enumerate(rows[shard : shard + 5]):
            if "image" in one:
                members.append((f"{number:03d}.png", (folder / one["image"]).read_bytes()))
            members.append((f"{number:03d}.json", json.dumps(one).encode()))
        write_shard(folder / f"s{shard:02d}.tar", members)
    return folder / "s*.tar"


def as_dataset(folder, rows, embed=True):
    import datasets

    kept = [
        one | {"image": {"bytes": (folder / one["image"]).read_bytes() if embed else None, "path": one["image"]}}
        if "image" in one else one | {"image": None}
        for one in rows
    ]  # fmt: skip
    turn = {"from": datasets.Value("string"), "value": datasets.Value("string")}
    image = datasets.Image() if embed else {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = {"id": datasets.Value("string"), "image": image, "conversations": [turn]}
    return datasets.Dataset.from_list(kept, datasets.Features(features))


def as_parquet(folder, rows):
    as_dataset(folder, rows[:7]).to_parquet(folder / "p0.parquet")
    as_dataset(folder, rows[7:]).to_parquet(folder / "p1.parquet")
    return folder / "p?.parquet"


def as_saved(folder, rows):
    as_dataset(folder, rows, embed=False).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def as_hub(folder, rows):
    (folder / "hub").mkdir()
    as_dataset(folder, rows).to_parquet(folder / "hub" / "train.parquet")
    return f"hf:{folder / 'hub'}:train"


def one_record(source, index):
    (record,) = source.records(index)
    return record
