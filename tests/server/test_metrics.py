import prometheus_client

from fader_server.metrics import OTHER, Labels, Metrics


def test_label_values_past_the_cap_share_one():
    labels = Labels(2)
    assert [labels.of(name) for name in "abcab"] == ["a", "b", OTHER, "a", "b"]


def test_series_stay_bounded_however_many_adapters_come():
    metrics = Metrics(max_adapter_labels=3)
    sizes = set()
    for n in range(100):
        metrics.ended(f"a{n}", "ok", seconds=1.0, prompt=1, completion=2)
        metrics.first(f"a{n}", 0.1)
        if n >= 3:
            sizes.add(len(metrics.render().splitlines()))
    assert len(sizes) == 1
    text = metrics.render().decode()
    assert 'fader_requests_total{adapter="other",outcome="ok"} 97.0' in text
    assert 'fader_tokens_total{direction="completion"} 200.0' in text


def test_nothing_is_registered_globally():
    before = list(prometheus_client.REGISTRY._names_to_collectors)
    Metrics()
    assert list(prometheus_client.REGISTRY._names_to_collectors) == before


def test_steps_are_counted():
    metrics = Metrics()
    metrics.on_step(0.02, 3, 40)
    text = metrics.render().decode()
    assert "fader_step_tokens_total 40.0" in text
    assert 'fader_step_rows_bucket{le="4.0"} 1.0' in text
    assert 'fader_step_rows_bucket{le="2.0"} 0.0' in text
