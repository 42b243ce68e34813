from entroformer_lib.coding import codec
from entroformer_lib.datasets import sample_picture
from entroformer_lib.models.clock import listening, stage_times
from entroformer_lib.studies.latency import STAGES, run


def test_stages_add_up_and_progress_is_told(any_variant):
    picture = sample_picture("chelsea").crop((0, 0, 192, 128))
    told = []
    with listening(lambda *step: told.append(step)), stage_times() as seconds:
        data = codec.encode(any_variant, picture)
        codec.decode(data, any_variant)
    assert set(seconds) <= set(STAGES) and seconds["transforms"] > 0 and seconds["entropy coding"] > 0
    if any_variant.config.context != "none":
        assert seconds["context"] > 0
        assert told[-1][1] == told[-1][2]
    before = dict(seconds)
    codec.encode(any_variant, picture)  # the clock runs no more
    assert seconds == before


def test_table_of_latencies():
    table = run(["tiny-parallel", "bmshj2018-hyperprior"], sample_picture("chelsea").resize((64, 64)), repeats=1)
    assert len(table) == 4 and (table.seconds > 0).all()
    ours = table[table.model == "tiny-parallel"]
    parts = ours[[f"{name.replace(' ', '_')}_s" for name in STAGES] + ["other_s"]].sum(axis=1)
    assert (abs(parts - ours.seconds) < 1e-6).all()
