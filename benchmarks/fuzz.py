"""Damaged and hostile files, many of them: what the decoder, the header, the loader of weights and the reader of
checkpoints make of each.

    python benchmarks/fuzz.py --count 100000 --out data/results/fuzz.json
    python benchmarks/fuzz.py --only 4711        # one of them again, with its traceback

Case n of a seed is the same in every run, and the same command goes on where a run was stopped. Half of the files are
changed blindly, byte by byte; of the others one field is changed on purpose, and the checksum is made right again.
Outcomes:

    same        the same picture
    claims      the same latents and another picture: the header says so, and its checksum was made right
    refused     one of our errors, a sentence
    accepted    weights or a checkpoint that are still whole
    wrong       other latents than the original's, and no error
    traceback   any other error
    slow        longer than SLOW seconds
"""

import functools
import io
import json
import random
import struct
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the test vectors, and checkpoints as released
import released
from format_vectors import FOLDER, formula_model

from entroformer_lib.codec import codec
from entroformer_lib.codec.container import Container
from entroformer_lib.entroformer import Entroformer
from entroformer_lib.errors import UserError
from entroformer_lib.models.config import EntroformerConfig
from entroformer_lib.studies.results import load, save
from entroformer_lib.weights.official import load_official
from entroformer_lib.weights.zoo import load_model, save_weights

SLOW = 10.0
VECTORS = (
    "parallel", "serial", "cnn", "hyperprior", "context", "official-parallel", "grouped-no-cross", "rates",
    "aware-parallel", "one-pixel",
)  # fmt: skip
MAX_PIXELS = 128 * 128
LENGTHS = (0, 1, 2, 15, 16, 63, 64, 65, 127, 128, 255, 256, 2**14 - 1, 2**14, 2**16 - 1, 2**16, 2**31, 2**32, 2**35 - 1)
FIELDS = (
    "magic", "version", "flags", "width", "height", "level", "name length", "name", "weights", "latents' CRC",
    "z length", "z", "y", "last CRC",
)  # fmt: skip
NAMES = (
    b"",
    b"\xff\xfe",
    b"../../etc/passwd",
    b"/x.safetensors",
    b"a\0b",
    b"tiny-parallel@0.1",
    b"n" * 250,
    b"n" * 300,
)
VALUES = (
    None,
    True,
    -1,
    0,
    1,
    7,
    2**31,
    10**12,
    10**400,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    [],
    [1],
    {},
    [[[]]],
)
PICKLED = (  # opcodes: a memo of 2^31, a string of 2^40, a call, an import, a deep tuple as a key, a loop, ends
    b"r\xff\xff\xff\x7f", b"\x8e" + struct.pack("<Q", 2**40), b"R", b"cos\nsystem\n", b"(" * 50, b"b", b".", b"0", b"2",
    b"N" + b"\x85" * 200_000 + b"}\x940N", b"}N" + b"\x85" * 200_000 + b"Ns", b"\x93", b"Q", b"\x94", b"h\x00", b"a",
    b"]" * 3000, b"I9999999999999999999999\n", b"\x8b\xff\xff\xff\x7f", b"P0\n", b"u", b"s", b"e", b"\x81", b"\x92",
)  # fmt: skip


def mutated(data: bytes, chance: random.Random) -> bytes:
    """A few bytes changed, put in, taken out, or copied from elsewhere."""
    data = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 16))):
        i, n = chance.randrange(len(data) + 1), chance.choice((1, 1, 2, 4, 8, 64))
        kind = chance.randrange(7)
        if kind == 0 and i < len(data):
            data[i] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[i : i + n] = chance.randbytes(len(data[i : i + n]))
        elif kind == 2:
            data[i : i + n] = bytes([chance.choice((0, 1, 127, 128, 255))]) * len(data[i : i + n])
        elif kind == 3:
            data[i:i] = chance.randbytes(n)
        elif kind == 4:
            del data[i : i + n]
        elif kind == 5:
            j = chance.randrange(len(data) + 1)
            data[i : i + n] = data[j : j + n]
        elif chance.random() < 0.3:
            del data[i:]
    return bytes(data)


# ---- .ef files ------------------------------------------------------------------------------------------------------


def leb128(value: int, chance: random.Random) -> bytes:
    """As in a header; sometimes with more bytes than are needed."""
    out = bytearray()
    while value >= 128 or chance.random() < 0.02:
        out.append(value % 128 + 128)
        value //= 128
    return bytes([*out, value])


def forged(whole: Container, field: str, chance: random.Random) -> bytes:
    """A file of which one field was changed on purpose, its checksum made right."""
    c = dict(vars(whole), magic=b"\x93EF", version=3, flags=whole.grey + 2 * (whole.level is not None))
    name, crc = whole.model.encode(), struct.pack("<I", whole.latents_crc)
    lengths = {"name length": len(name), "z length": len(whole.z_string)}
    level = b"" if whole.level is None else struct.pack("<H", round(whole.level * 256))
    wild = chance.choice((*LENGTHS, chance.getrandbits(chance.randrange(1, 36))))
    if field in ("magic", "weights"):
        c[field] = mutated(c[field], chance)
    elif field in ("version", "flags"):
        c[field] = chance.choice((0, 1, 2, 3, 4, 128, 255))
    elif field in ("width", "height"):
        c[field] = wild if chance.random() < 0.5 else max(0, c[field] + chance.randrange(-70, 70))
    elif field == "level":
        c["flags"] ^= 2 * (chance.random() < 0.3)
        level = chance.randbytes(chance.choice((0, 1, 2, 2, 2, 3)))
    elif field in lengths:
        lengths[field] = wild if chance.random() < 0.5 else max(0, lengths[field] + chance.randrange(-9, 9))
    elif field == "name":
        name = chance.choice((*NAMES, mutated(name, chance)))
        lengths["name length"] = len(name)
    elif field == "latents' CRC":
        crc = mutated(crc, chance)
    elif field in ("z", "y"):
        c[f"{field}_string"] = mutated(c[f"{field}_string"], chance)
        lengths["z length"] = len(c["z_string"])
    header = c["magic"] + bytes([c["version"], c["flags"]]) + leb128(c["width"], chance) + leb128(c["height"], chance)
    header += level + leb128(lengths["name length"], chance) + name + c["weights"] + crc
    data = header + leb128(lengths["z length"], chance) + c["z_string"] + c["y_string"]
    right = struct.pack("<I", zlib.crc32(data))
    return data + (mutated(right, chance) if field == "last CRC" else right)


@functools.cache
def originals() -> list[tuple[Entroformer, bytes, np.ndarray, list[np.ndarray]]]:
    """Model, file, pixels and latents of some test vectors."""
    found = []
    for name in VECTORS:
        model, data = vector_model(name), (FOLDER / f"{name}.ef").read_bytes()
        found.append((model, data, np.asarray(codec.decode(data, model)), latents(model, data)))
    return found


def vector_model(name: str) -> Entroformer:
    """The model of a test vector."""
    config = json.loads((FOLDER / "vectors.json").read_text())[name]["config"]
    return formula_model(EntroformerConfig.from_json(json.dumps(config)), name)


class Files:
    """Mutated .ef files, and what the decoder makes of them."""

    def __init__(self):
        self.originals = originals()

    def case(self, chance: random.Random) -> tuple[int, bytes, str]:
        """Number of the original, changed file, which field was changed."""
        i = chance.randrange(len(VECTORS))
        data = self.originals[i][1]
        if chance.random() < 0.5:
            field = chance.choice(FIELDS)
            return i, forged(Container.unpack(data), field, chance), field
        changed = mutated(data, chance)
        if chance.random() < 0.3 and len(changed) > 8:
            return i, changed[:-4] + struct.pack("<I", zlib.crc32(changed[:-4])), "any byte, right CRC"
        return i, changed, "any byte"

    def decode(self, chance: random.Random) -> str:
        i, data, field = self.case(chance)
        model, _, pixels, known = self.originals[i]
        named = chance.random() < 0.1  # no model is given
        found = np.asarray(codec.decode(data, None if named else model, "cpu", MAX_PIXELS))
        if np.array_equal(found, pixels):
            return "same"
        alike = all(np.array_equal(a, b) for a, b in zip(known, latents(model, data), strict=True))
        return "claims" if alike and field not in ("any byte", "z", "y") else "wrong"

    def header(self, chance: random.Random) -> str:
        i, data, _ = self.case(chance)
        same = Container.unpack(data) == Container.unpack(self.originals[i][1])
        return "same" if same else "claims"


def latents(model, data: bytes) -> list[np.ndarray]:
    """y, and z where there is one."""
    c = Container.unpack(data)
    y_shape, z_shape = codec.latent_shapes(c.width, c.height, model)
    found = model.decompress_latents([[c.y_string], [c.z_string]], z_shape or y_shape, c.level)
    return [t.numpy() for t in found if t is not None]


# ---- weights and checkpoints ----------------------------------------------------------------------------------------


def forged_json(value, chance: random.Random):
    """JSON of which one value somewhere was changed on purpose."""
    if isinstance(value, dict | list) and value and chance.random() < 0.9:
        copy = dict(value) if isinstance(value, dict) else dict(enumerate(value))
        key = chance.choice(list(copy))
        kind = chance.random()
        if kind < 0.05:
            del copy[key]
        elif kind < 0.1 and isinstance(value, dict):
            copy[f"{key}x"] = copy.pop(key)
        else:
            copy[key] = forged_json(copy[key], chance)
        return copy if isinstance(value, dict) else list(copy.values())
    return chance.choice(VALUES)


class Weights:
    """Mutated weights of the library, and what the loader makes of them."""

    def __init__(self, folder: Path):
        self.path = folder / "fuzz.safetensors"
        self.originals = []
        for name in ("one-pixel", "aware-grouped", "official-parallel", "blocks"):
            save_weights(vector_model(name), self.path, {"lmbda": 0.01, "metric": "mse", "training": {"model": "tiny"}})
            self.originals.append(self.path.read_bytes())

    def load(self, chance: random.Random) -> str:
        data = chance.choice(self.originals)
        (length,) = struct.unpack_from("<Q", data)
        text, numbers = data[8 : 8 + length], data[8 + length :]
        header, field = (
            json.loads(text),
            chance.choice(("any byte", "header", "metadata", "config", "numbers", "tensor")),
        )
        begin, end = header["_extra_state"]["data_offsets"]
        config, rest = json.loads(numbers[begin:end]), header["__metadata__"]
        if field == "any byte":
            data = mutated(data, chance)
        elif field == "numbers":
            data = data[: 8 + length] + mutated(numbers, chance)[: len(numbers)].ljust(len(numbers), b"\xff")
        else:
            if field == "header":
                text = mutated(text, chance)
            elif field == "metadata":
                rest["transforms"] = chance.choice(('{"name": "fuzz", "sha256": "0"}', "{}", "[1]", "x"))
                key = chance.choice(list(rest))
                rest[key] = chance.choice(
                    (json.dumps(forged_json({"name": "x"}, chance)), mutated(b"[]", chance).hex())
                )
            elif field == "config":
                changed = json.dumps(forged_json(config, chance)).encode()
                numbers = numbers[:begin] + changed + numbers[end:]
                longer = len(changed) - (end - begin)
                for name, entry in header.items():
                    if name != "__metadata__" and entry["data_offsets"][0] >= end:
                        entry["data_offsets"] = [offset + longer for offset in entry["data_offsets"]]
                header["_extra_state"] |= {"shape": [len(changed)], "data_offsets": [begin, begin + len(changed)]}
            else:
                header = forged_json(header, chance)
            text = text if field == "header" else json.dumps(header).encode()
            data = struct.pack("<Q", len(text)) + text + numbers
        self.path.write_bytes(data)
        model = load_model(self.path, "cpu")
        if chance.random() < 0.2:  # its tables may be others now
            codec.decode(codec.encode(model, np.full((16, 16, 3), 90, np.uint8)), model)
        return "accepted"


class Checkpoints:
    """Mutated checkpoints as the authors release them, and what their reader makes of them."""

    def __init__(self, folder: Path):
        self.path = folder / "fuzz.pth"
        small = released.COMMON | dict(N=3, M=4, Z=2, dim=8, layers=1)
        parts = released.released(small)
        state_dicts = {name: part.state_dict() for name, part in parts.items()}
        forms = [(content, zipped) for content in (parts, state_dicts) for zipped in (True, False)]
        self.originals = [
            (released.save(content, self.path, _use_new_zipfile_serialization=zipped).read_bytes(), zipped)
            for content, zipped in forms
        ]

    def load(self, chance: random.Random) -> str:
        data, zipped = chance.choice(self.originals)
        field = chance.choice(("any byte", "pickle", "opcode"))
        if field != "any byte" and zipped:
            data = in_archive(data, lambda pickled: changed_pickle(pickled, field, chance), chance)
        elif field != "any byte":
            data = changed_pickle(data, field, chance)
        else:
            data = mutated(data, chance)
        self.path.write_bytes(data)
        load_official(self.path)
        return "accepted"


def changed_pickle(data: bytes, field: str, chance: random.Random) -> bytes:
    """Any bytes changed, or a hostile piece put in."""
    if field == "pickle":
        return mutated(data, chance)
    i = chance.randrange(len(data))
    return data[:i] + chance.choice(PICKLED) + data[i:]


def in_archive(data: bytes, change: Callable[[bytes], bytes], chance: random.Random) -> bytes:
    """The archive with another pickle in it, now and then compressed."""
    how, out = zipfile.ZIP_DEFLATED if chance.random() < 0.1 else zipfile.ZIP_STORED, io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", how) as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return out.getvalue()


# ---- the run --------------------------------------------------------------------------------------------------------


def targets(folder: Path) -> dict[str, Callable[[random.Random], str]]:
    """What is tried, by name; folder: for files that are loaded by their path."""
    files = Files()
    return {
        "decode": files.decode,
        "header": files.header,
        "weights": Weights(folder).load,
        "checkpoint": Checkpoints(folder).load,
    }


SHARES = ("decode",) * 5 + ("header",) * 3 + ("weights", "checkpoint")  # of ten cases


def outcome(run: Callable[[random.Random], str], chance: random.Random) -> tuple[str, str]:
    """Outcome, and what was said of it."""
    start = time.process_time()
    try:
        result, said = run(chance), ""
    except UserError as error:
        result, said = "refused", str(error)
        if not said.endswith((".", ". ")) or "\n" in said.strip():
            result = "traceback"  # no sentence
    except Exception:
        result, said = "traceback", traceback.format_exc()
    return ("slow" if time.process_time() - start > SLOW else result), said


def fuzz(count: int, seed: int = 0, first: int = 0) -> dict:
    """Runs cases.  ->  outcomes of each target, and what was found: its number, target and traceback"""
    outcomes, found = {name: Counter() for name in SHARES}, []
    with tempfile.TemporaryDirectory() as folder:
        runs = targets(Path(folder))
        for number in range(first, first + count):
            chance, name = random.Random(f"{seed}-{number}"), SHARES[number % len(SHARES)]
            result, said = outcome(runs[name], chance)
            outcomes[name][result] += 1
            if result in ("wrong", "traceback", "slow"):
                found.append({"number": number, "target": name, "outcome": result, "said": said[-1500:]})
    return {"outcomes": {name: dict(sorted(counts.items())) for name, counts in outcomes.items()}, "found": found}


BLOCK = 1000  # cases between two savings


def main(count: int = 100_000, seed: int = 0, only: int | None = None, out: Path | None = None) -> None:
    """Runs cases and says how they ended.

    Args:
        count: How many.
        seed: Of all chance.
        only: The number of a single case.
        out: Where to save the result; a run that was stopped goes on there.
    """
    torch.set_num_threads(1)
    if only is not None:
        print(json.dumps(fuzz(1, seed, only), indent=1).replace("\\n", "\n"))
        return
    total = {"seed": seed, "count": 0, "seconds": 0.0, "outcomes": {name: {} for name in SHARES}, "found": []}
    before = out and load(out)
    if before and before["seed"] == seed:
        total = {key: before[key] for key in total}
    while total["count"] < count:
        start, some = time.perf_counter(), min(BLOCK, count - total["count"])
        result = fuzz(some, seed, total["count"])
        for name, counts in result["outcomes"].items():
            total["outcomes"][name] = dict(sorted((Counter(total["outcomes"][name]) + Counter(counts)).items()))
        total["found"] += result["found"]
        total["count"] += some
        total["seconds"] = round(total["seconds"] + time.perf_counter() - start, 1)
        if out is not None:
            save(out, total)
        print(
            f"{total['count']:,} in {total['seconds']:.0f} s, {len(total['found'])} found", file=sys.stderr, flush=True
        )
    print(json.dumps(total, indent=1))


if __name__ == "__main__":
    tyro.cli(main)
