import subprocess
import sys
from pathlib import Path

from lit_specrl.bench.weight_sync import bench_weight_sync
from lit_specrl.engines import VLLMEngine


class Greedy(VLLMEngine):
    """Gathers all weights before it takes over the first; its peak is that of a second copy."""

    def load_weights(self, weights, version):
        super().load_weights([(name, weight.clone()) for name, weight in weights], version)


def test_the_table_tells_time_and_memory(tiny_model):
    report = bench_weight_sync(tiny_model, dtype="float32", repeats=2, device="cpu")
    (row,) = report.tables["measured"]
    assert 0 < row["layer_MiB"] < row["weights_MiB"] < 1
    assert 0 < row["seconds_min"] <= row["seconds_median"] <= row["seconds_max"]
    assert row["peak_beyond_both_MiB_max"] >= 0


def test_adapters_go_over_alone(tiny_model):
    report = bench_weight_sync(tiny_model, dtype="float32", repeats=1, lora_rank=2, merge_adapters=False, device="cpu")
    assert report.settings["lora_rank"] == 2
    assert report.tables["measured"][0]["seconds_median"] > 0


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[2])
from lit_specrl.bench import weight_sync
from test_weight_sync import Greedy
for engine in (weight_sync.VLLMEngine, Greedy):
    weight_sync.VLLMEngine = engine
    (row,) = weight_sync.bench_weight_sync(sys.argv[1], dtype="float32", repeats=2, device="cpu").tables["measured"]
    print(row["weights_MiB"], row["peak_beyond_both_MiB_max"])
"""


def test_weights_go_over_one_after_the_other(make_llama):
    """An engine that gathers them first is seen."""
    model = make_llama(hidden_size=512, intermediate_size=2048, num_hidden_layers=12, vocab_size=8192)
    program = [sys.executable, "-c", PROGRAM, model, str(Path(__file__).parent)]
    output = subprocess.run(program, capture_output=True, text=True, check=True, timeout=200).stdout
    weights, streamed, _, greedy = (float(number) for number in output.split()[-4:])
    assert streamed < weights / 3
    assert greedy > weights / 2
