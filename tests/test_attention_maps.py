"""The saved maps of figures 8 to 10 are those of the row server."""

import json

import numpy as np
import pytest
from conftest import micro_model

from entroformer_lib.errors import AttentionError, StudyError
from entroformer_lib.inspection.row_server import RowServer
from entroformer_lib.studies import attention, attention_maps
from entroformer_lib.studies.results import result_path
from entroformer_lib.weights.zoo import save_weights


@pytest.mark.parametrize("variant", ["serial", "parallel"])
def test_maps(variant, photo):
    server = RowServer(micro_model(variant), photo)
    points = [(2, 4), (5, 5)]
    found = attention_maps.maps(server, points, ks=(3, 0))
    assert [m["figure"] for m in found] == [8, 8, *[9] * server.heads, 10, 10]
    for m in found:
        probs = np.array(m["probs"])
        assert probs.shape == (server.height, server.width) and probs.sum() == pytest.approx(1, abs=0.01)
        assert tuple(m["query"]) == (points[0] if m is found[0] else points[1])
    heads = np.mean([m["probs"] for m in found if m["figure"] == 9], axis=0)
    assert np.allclose(found[1]["probs"], heads, atol=2e-5)  # figure 8: the mean of the heads
    assert [np.count_nonzero(m["probs"]) for m in found[-2:]][0] == 3


def test_models_trained_with_different_k(photo):
    servers = [RowServer(micro_model("serial", top_k=k, seed=i), photo) for i, k in enumerate((2, 5, None))]
    *_, two, five, dense = attention_maps.maps(servers[0], [(5, 5)], trained=servers)
    assert [m["title"] for m in (two, five, dense)] == ["k = 2", "k = 5", "dense"]
    for m, server in zip((two, five, dense), servers, strict=True):
        probs = server.rows(5 * server.width + 5, server.default_k)[-1].mean(0)
        assert m["figure"] == 10 and np.allclose(np.ravel(m["probs"]), probs, atol=1e-5)


def test_saved_with_provenance(tmp_path):
    save_weights(micro_model("parallel"), tmp_path / "micro.safetensors", {})
    attention_maps.save(str(tmp_path / "micro.safetensors"), out=tmp_path / "maps.json")
    saved = json.loads((tmp_path / "maps.json").read_text())
    assert saved["provenance"]["weights_sha256"] and saved["picture"] == "coffee"
    assert {m["figure"] for m in saved["maps"]} == {8, 9, 10}


def test_what_cannot_be_saved_is_refused_first(tmp_path):
    with pytest.raises(AttentionError, match="no layer 99"):
        attention_maps.save("blocks-parallel", layer=99, out=tmp_path / "maps.json")
    with pytest.raises(StudyError, match="is a folder"):
        attention_maps.save("blocks-parallel", out=tmp_path)
    with pytest.raises(StudyError, match="of another study"):
        attention.main("blocks-parallel", tmp_path, out=result_path("classical"))
