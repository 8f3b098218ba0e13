"""The report as JSON, as text and as a picture."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from qsteer.bench.latency import list_methods, make_subject, measure
from qsteer.bench.parts import PARTS
from qsteer.bench.report import as_json, format_report
from qsteer.evaluation.plots import plot_latency

torch.set_num_threads(1)


@pytest.mark.usefixtures("made_up_ceilings")
def test_the_whole_report(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    found = make_subject("mlp", "tiny", chunk=4)
    chosen = {name: list_methods(found)[name] for name in ("Tweedie", "Posterior(map), N=4")}
    report = measure(found, chosen, repeats=2, warmup=0)
    told = json.loads(json.dumps(as_json(report)))
    by_name = {method["name"]: method for method in told["methods"]}
    assert torch.get_num_threads() == threads == told["conditions"]["threads"]
    tweedie, stock = by_name["Tweedie"], by_name["stock"]
    assert tweedie["passes"]["policy"]["backwards"] == 9 and stock["passes"]["policy"]["forwards"] == 10
    assert stock["ratio"]["stock"] == [1, 1, 1] and len(tweedie["times_ms"]) == 2
    assert tweedie["predicted_ms"] > 0 and by_name["Posterior(map), N=4"]["predicted_ms"] is None
    assert tweedie["flops"] > stock["flops"] and tweedie["peak_memory_bytes"] is None
    assert tweedie["ratio"]["roofline"] == pytest.approx(tweedie["p50_ms"] / stock["roofline_ms"])
    assert stock["saved_tensors"]["tensors"] == 0 < tweedie["saved_tensors"]["tensors"]
    text = format_report(told)
    assert all(name in text for name in (*by_name, "/ stock", "/ fast", "/ roofline", *PARTS))
    assert "unsteered, static" in by_name and "left out" not in text
    assert by_name["unsteered, static"]["ratio"]["fast"] == [1, 1, 1]
    picture = plot_latency(told, tmp_path / "latency.png")
    assert Image.open(picture).width > 1000
    with pytest.raises(ValueError, match="name arms"):
        plot_latency({"methods": [stock]}, tmp_path / "none.png")
