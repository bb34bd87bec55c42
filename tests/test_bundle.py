"""A bundle from elsewhere is verified before anything in it is opened."""

import io
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deploy import bundles
from onnx import TensorProto, helper

from pipelines import bundle, stage
from pipelines.errors import UserError

MODEL, CONTRACT, REFERENCE = bundle.MODEL, bundle.CONTRACT, bundle.REFERENCE


class Evil:
    """Unpickled, it would say so."""

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str, str]]:
        return os.putenv, ("HEADRACE_OPENED", "1")


def _model(change: Callable[[onnx.ModelProto], object]) -> Callable[[Path], object]:
    """A bundle whose network was changed."""

    def apply(folder: Path) -> None:
        model = onnx.load(folder / MODEL, load_external_data=False)
        change(model)
        (folder / MODEL).write_bytes(model.SerializeToString())

    return apply


def _zip() -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as made:
        made.writestr("archive/data.pkl", pickle.dumps(Evil()))
    return held.getvalue()


def _external(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../../etc/passwd")


def _hidden_external(model: onnx.ModelProto) -> None:
    """In the branch of an If, where a walk over initializers does not look."""
    tensor = helper.make_tensor("far", TensorProto.FLOAT, [1], [0.0])
    tensor.external_data.add(key="location", value="/etc/passwd")
    constant = helper.make_node("Constant", [], ["out"], value=tensor)
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [1])
    branch = helper.make_graph([constant], "branch", [], [out])
    when = helper.make_node("If", ["yes"], ["y1"], then_branch=branch, else_branch=branch)
    model.graph.node.append(when)
    model.graph.initializer.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))


def _unfolding(model: onnx.ModelProto) -> None:
    """A few bytes that become 4 TB when it is loaded."""
    shape = helper.make_tensor("much", TensorProto.INT64, [2], [1 << 20, 1 << 20])
    model.graph.initializer.append(shape)
    model.graph.node.append(helper.make_node("ConstantOfShape", ["much"], ["bomb"]))


def _repeating(model: onnx.ModelProto) -> None:
    """Ten lines, each a thousand times the one before."""
    model.graph.initializer.append(helper.make_tensor("often", TensorProto.INT64, [1], [1000]))
    last = "zero"
    for number in range(10):
        model.graph.node.append(helper.make_node("Tile", [last, "often"], [f"more{number}"]))
        last = f"more{number}"


def _adding_up(model: onnx.ModelProto) -> None:
    """Forty values of a size that is allowed to one."""
    shape = helper.make_tensor("wide", TensorProto.INT64, [1], [1 << 17])
    model.graph.initializer.append(shape)
    model.graph.node.append(helper.make_node("ConstantOfShape", ["wide"], ["sum0"]))
    for number in range(40):
        more = helper.make_node("Exp", [f"sum{number}"], [f"sum{number + 1}"])
        model.graph.node.append(more)


def _small(model: onnx.ModelProto) -> None:
    """A megabyte of integers."""
    raw = bytes(1 << 20)
    tensor = helper.make_tensor("small", TensorProto.INT8, [1 << 20], raw, raw=True)
    scale = helper.make_tensor("step", TensorProto.FLOAT, [], [1.0])
    model.graph.initializer.extend([tensor, scale])


def _dequantizing(model: onnx.ModelProto) -> None:
    """A hundred times as floats."""
    _small(model)
    for number in range(100):
        node = helper.make_node("DequantizeLinear", ["small", "step"], [f"large{number}"])
        model.graph.node.append(node)


def _casting(model: onnx.ModelProto) -> None:
    _small(model)
    for number in range(100):
        node = helper.make_node("Cast", ["small"], [f"large{number}"], to=TensorProto.FLOAT)
        model.graph.node.append(node)


def _casting_to_more(model: onnx.ModelProto) -> None:
    """Once, and each byte is a text of its own."""
    _small(model)
    text = helper.make_node("Cast", ["small"], ["texts"], to=TensorProto.STRING)
    model.graph.node.append(text)


def _by_data(model: onnx.ModelProto) -> None:
    """How much it wants only a caller's number says."""
    cast = helper.make_node("Cast", ["x"], ["length"], to=TensorProto.INT64)
    model.graph.node.extend([cast, helper.make_node("ConstantOfShape", ["length"], ["bomb"])])


def _custom(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.evil", 1))
    model.graph.node.append(helper.make_node("Run", ["x"], ["ran"], domain="com.evil"))


def _sparse(model: onnx.ModelProto) -> None:
    values = helper.make_tensor("values", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("indices", TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [1 << 40]))


def _renamed(model: onnx.ModelProto) -> None:
    model.graph.input[1].name, model.graph.input[2].name = "y", "x"


def _linked(folder: Path) -> None:
    outside = folder.parent / "outside.json"
    (folder / CONTRACT).rename(outside)
    (folder / CONTRACT).symlink_to(outside)


def _sparse_file(folder: Path) -> None:
    with (folder / MODEL).open("r+b") as file:
        file.truncate(1 << 40)


def _swollen_table(folder: Path) -> None:
    """A small file that unfolds to a gigabyte."""
    text = pa.array(["x" * 65536]).dictionary_encode()
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 5_000, pa.int32()), text.dictionary)
    table = pa.table({"label": [0] * 5_000, "text": column.cast(pa.string())})
    pq.write_table(table, folder / REFERENCE, compression="zstd", use_dictionary=False)


def _fifo(folder: Path) -> None:
    (folder / REFERENCE).unlink()
    os.mkfifo(folder / REFERENCE)


HOSTILE: dict[str, Callable[[Path], object]] = {
    "a pickle for a model": lambda f: (f / MODEL).write_bytes(pickle.dumps(Evil())),
    "a pickle for a contract": lambda f: (f / CONTRACT).write_bytes(pickle.dumps(Evil())),
    "a pickle for a reference": lambda f: (f / REFERENCE).write_bytes(pickle.dumps(Evil())),
    "a pickle beside": lambda f: (f / "weights.pkl").write_bytes(pickle.dumps(Evil())),
    "a checkpoint, a zip with a pickle": lambda f: (f / MODEL).write_bytes(_zip()),
    "a hidden file": lambda f: (f / ".hidden").write_text("x"),
    "a folder": lambda f: (f / "more").mkdir(),
    "a name with a path": lambda f: (f / "..\\..\\model.onnx").write_text("x"),
    "a link for a file": _linked,
    "a pipe for a file": _fifo,
    "a file less": lambda f: (f / REFERENCE).unlink(),
    "a model of a terabyte": _sparse_file,
    "external data": _model(_external),
    "external data in a branch": _model(_hidden_external),
    "an operator of another domain": _model(_custom),
    "another domain, not used": _model(
        lambda m: m.opset_import.append(helper.make_opsetid("com.evil", 1))
    ),
    "a constant of terabytes": _model(_unfolding),
    "a constant in ten steps": _model(_repeating),
    "values that add up": _model(_adding_up),
    "weights that unfold": _model(_dequantizing),
    "weights that are cast": _model(_casting),
    "weights that become texts": _model(_casting_to_more),
    "a size that the caller says": _model(_by_data),
    "a sparse tensor of terabytes": _model(_sparse),
    "a tensor that says more than it holds": _model(
        lambda m: m.graph.initializer[0].dims.__setitem__(0, 1 << 40)
    ),
    "columns in another order": _model(_renamed),
    "a graph of nothing": _model(lambda m: m.ClearField("graph")),
    "a contract that nests": lambda f: (f / CONTRACT).write_text("[" * 100_000),
    "a contract of another kind": lambda f: (f / CONTRACT).write_text('{"columns": 3}'),
    "a table that swells": _swollen_table,
}


@pytest.fixture
def none_opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing unpickles, nothing reaches ONNX Runtime, and no pickle ran."""
    import onnxruntime

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, opened)
    yield
    assert os.environ.get("HEADRACE_OPENED") is None


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "bundle"
    bundles.make(folder)
    return folder


@pytest.fixture
def copied(sound: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    target = tmp_path / "bundle"
    target.mkdir()
    for file in sound.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_a_sound_bundle_is_taken_and_answers_as_its_scorer(sound: Path) -> None:
    found = bundle.verified(sound, stage.digest(sound))
    session = bundle.open_session(found.model)
    table = bundles.rows(50)
    again = bundle.Scorer(found.contract, session).predict(table)
    assert (again == bundle.load(sound).predict(table)).all()
    assert found.base_rate() == bundles.BASE_RATE


@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_bundle_is_refused_and_never_opened(
    copied: Path, how: str, none_opened: None
) -> None:
    """Even where whoever made it also gave its hash."""
    HOSTILE[how](copied)
    # The hash of a terabyte or of a pipe nobody can know.
    digest = (
        "0" * 64 if how in ("a model of a terabyte", "a pipe for a file") else stage.digest(copied)
    )
    with pytest.raises(UserError) as refused:
        bundle.verify(copied, digest)
    assert str(refused.value).count("\n") == 0
    assert str(refused.value).startswith(str(copied))
    assert "its hash is" not in str(refused.value)


@pytest.mark.parametrize("name", [MODEL, CONTRACT, REFERENCE])
def test_a_changed_byte_is_refused(copied: Path, name: str, none_opened: None) -> None:
    digest = stage.digest(copied)
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / name).write_bytes(content)
    with pytest.raises(UserError, match=r"its hash is .* expected"):
        bundle.verify(copied, digest)


def test_a_link_for_the_folder_is_refused(copied: Path, tmp_path: Path, none_opened: None) -> None:
    link = tmp_path / "link"
    link.symlink_to(copied)
    with pytest.raises(UserError, match="expected a folder of exactly"):
        bundle.verify(link, stage.digest(copied))
