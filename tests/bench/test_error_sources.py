"""Where a student's distance comes from: the rows are the paths, the student from each state, and real images."""

import numpy as np
import pytest
import torch

from bench import error_sources
from hsivi_fast import load_config, train
from hsivi_fast.data import load_data
from hsivi_fast.metrics.evaluation import evaluate

RUN = [
    *("device=cpu", "nfe=3", "start.kind=trajectory", "start.updates=3", "start.trajectories=32", "eval.num_samples=0"),
    *("train.steps=4", "train.batch_size=16", "eta=0.3", "log_every=1"),
]


@pytest.fixture(scope="module")
def run(no_report, tmp_path_factory):
    return train(load_config("smoke", RUN), tmp_path_factory.mktemp("run") / "run")


def test_the_rows_lead_from_the_paths_to_the_student(run):
    rows = error_sources.sources(run, 250)
    names = ["the paths", "student from x_1", "student from x_2", "student from x_3, the whole", "250 real ones"]
    assert [row["images"] for row in rows] == names
    assert rows[0]["difference"] == 0 and 0 < rows[1]["difference"] < rows[3]["difference"]
    whole = evaluate(run, 250)["frechet_distance"]
    assert rows[3]["frechet_distance"] == pytest.approx(whole, rel=1e-5)
    assert rows[4]["unsure"] < 0.6 and rows[4]["proportions"] < 0.1 and rows[4]["difference"] is None


def test_the_student_from_the_top_is_its_sampler(run):
    student = error_sources.Student(run, 250)
    states = student.path_states()
    assert len(states) == 4 and all(state.shape == (250, 1, 8, 8) for state in states)
    np.testing.assert_allclose(student.from_layer(states[3], 3).numpy(), student.sampler(range(250)).numpy(), atol=1e-5)


def test_proportions_and_certainty():
    data = load_data("digits")
    classifier, _ = error_sources.classifier_of(load_config("digits"))
    eights = ((torch.from_numpy(data.images[data.labels == 8]) + 1) * 127.5).round().to(torch.uint8)
    known = error_sources.judged(classifier, torch.full((10,), 0.1), eights)
    assert known["proportions"] == pytest.approx(0.9, abs=0.05)  # all in one class: half of 0.9 + 9 * 0.1
    assert 0 < known["unsure"] < 0.7


def test_a_new_score_network_loses_what_the_teacher_does(run):
    loss, of_teacher = error_sources.score_network(run)
    assert loss == pytest.approx(of_teacher, rel=0.2) and loss > 0
