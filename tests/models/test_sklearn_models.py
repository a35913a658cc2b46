"""Classifiers of scikit-learn as teachers: what they answer, how they are named, kept and fitted again."""

from __future__ import annotations

import json
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import sklearn
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.datasets import load_iris, load_wine
from sklearn.ensemble import RandomForestClassifier, VotingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch import nn

from potstill.errors import ModelError
from potstill.models import sklearn_models
from potstill.models.inputs import respond
from potstill.models.load import Blueprint, load_model, save_model
from potstill.models.sklearn_models import Sklearn, SklearnModel, SklearnTeacher
from potstill.teachers.cached import Cached, weights_hash
from potstill.teachers.live import Live

WINE = load_wine(return_X_y=True)
FACTS = {"num_labels": 3, "in_features": 13}


def rows(count: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Standardised wine, every third row."""
    found = StandardScaler().fit_transform(WINE[0])[::3][:count]
    return torch.tensor(found, dtype=torch.float32), torch.tensor(WINE[1][::3][:count])


def blueprint(name: str = "RandomForestClassifier", **kwargs: object) -> Blueprint:
    return Blueprint(f"sklearn:{name}", kwargs)


def fitted(name: str = "RandomForestClassifier", *, seed: int = 0, **kwargs: object) -> SklearnModel:
    options = {"n_estimators": 7} if "Forest" in name else {}
    model = blueprint(name, **{**options, **kwargs}).build(FACTS, seed=seed)
    model.fit(*rows())
    return model


class TestTeacher:
    """An estimator that a person has fitted."""

    def test_its_logits_are_the_logarithms_of_its_probabilities(self):
        logistic = make_pipeline(StandardScaler(), LogisticRegression()).fit(*WINE)
        inputs = torch.tensor(WINE[0], dtype=torch.float32)
        logits = SklearnTeacher(logistic)(inputs)
        assert logits.dtype == torch.float32
        expected = logistic.predict_log_proba(inputs.double().numpy())
        np.testing.assert_allclose(logits.numpy(), expected.clip(np.log(1e-7)), atol=1e-5)
        np.testing.assert_allclose(
            logits.softmax(-1).numpy(), logistic.predict_proba(inputs.double().numpy()), atol=1e-6
        )

    def test_a_probability_of_zero_is_finite(self):
        forest = RandomForestClassifier(3, random_state=0).fit(*WINE)
        logits = SklearnTeacher(forest)(torch.tensor(WINE[0]))
        assert logits.isfinite().all()
        assert float(logits.min()) == pytest.approx(np.log(1e-7))

    def test_images_are_flattened_and_any_precision_is_taken(self):
        model = fitted()
        inputs = rows()[0]
        assert torch.equal(model(inputs.reshape(-1, 1, 13, 1)), model(inputs))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(inputs), model(inputs.clone()))
            assert model(inputs.bfloat16()).dtype == torch.float32

    def test_the_order_of_the_classes(self):
        names = np.array(["setosa", "versicolor", "virginica"])
        inputs, labels = load_iris(return_X_y=True)
        named = GaussianNB().fit(inputs, names[labels])
        numbered = GaussianNB().fit(inputs, labels)
        order = ["virginica", "setosa", "versicolor", "unseen"]
        answers = SklearnTeacher(named, classes=order)(torch.tensor(inputs)).softmax(-1)
        plain = SklearnTeacher(numbered)(torch.tensor(inputs)).softmax(-1)
        torch.testing.assert_close(answers[:, :3], plain[:, [2, 0, 1]])
        assert answers[:, 3].max() < 1e-6
        with pytest.raises(ModelError, match=r"say their order with `classes`"):
            SklearnTeacher(named)
        with pytest.raises(ModelError, match="knows the class 'setosa', which is not among"):
            SklearnTeacher(named, classes=["virginica", "versicolor"])

    def test_a_class_that_it_has_not_seen_leaves_the_others_in_their_places(self):
        """Else the probabilities of class 2 would be taken for those of class 1."""
        inputs, labels = rows()
        some = labels != 1
        logits = SklearnTeacher(GaussianNB().fit(inputs[some].numpy(), labels[some].numpy()))(inputs)
        assert logits.shape == (60, 3)
        assert set(logits.argmax(-1).tolist()) == {0, 2}

    def test_ensembles_of_several_kinds_and_data_frames(self):
        frame = pd.DataFrame(WINE[0], columns=[f"c{place}" for place in range(13)])
        both = VotingClassifier([("a", GaussianNB()), ("b", GaussianNB(var_smoothing=0.1))], voting="soft")
        both.fit(frame, WINE[1])
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # that of missing feature names would come with every batch
            logits = SklearnTeacher(both)(torch.tensor(WINE[0]))
        np.testing.assert_allclose(logits.exp().numpy(), both.predict_proba(frame).clip(1e-7), rtol=1e-4)

    def test_what_cannot_teach(self):
        with pytest.raises(ModelError, match="LinearSVC as it is has none"):
            SklearnTeacher(LinearSVC().fit(*WINE))
        with pytest.raises(ModelError, match="expected a fitted classifier of one label, got GaussianNB"):
            SklearnTeacher(GaussianNB())

    def test_it_has_no_parameters_and_no_state(self):
        teacher = SklearnTeacher(GaussianNB().fit(*WINE))
        assert list(teacher.parameters()) == list(teacher.buffers()) == []
        assert teacher.state_dict() == {}
        assert teacher.to("cpu") is teacher

    def test_a_cache_knows_which_one_answered(self, tmp_path):
        """Two forests have the same options and no weights: by their trees alone they are told apart."""
        inputs = torch.tensor(WINE[0], dtype=torch.float32)
        batch = {"features": inputs, "sample_id": torch.arange(len(inputs))}
        forests = [RandomForestClassifier(5, random_state=seed).fit(*WINE) for seed in (0, 1, 0)]
        teachers = [SklearnTeacher(forest) for forest in forests]
        hashes = [weights_hash(teacher) for teacher in teachers]
        assert hashes[0] == hashes[2] != hashes[1]
        cached = [Cached(teacher, tmp_path) for teacher in teachers]
        for teacher, source in zip(teachers, cached, strict=True):
            assert torch.equal(source(batch)["logits"], teacher(inputs))
        assert [source.counts.made for source in cached] == [178, 178, 0]

    def test_it_is_a_live_teacher(self):
        teacher = SklearnTeacher(GaussianNB().fit(*WINE))
        batch = {"features": torch.tensor(WINE[0]), "labels": torch.tensor(WINE[1]), "sample_id": torch.arange(178)}
        assert torch.equal(Live(teacher)(batch)["logits"], teacher(batch["features"]))
        assert torch.equal(respond(teacher, {"pixel_values": batch["features"]})["logits"], teacher(batch["features"]))


class TestNames:
    def test_every_named_classifier_can_be_made_and_asked_for_its_options(self):
        names = sklearn_models._classifiers()
        assert {"RandomForestClassifier", "HistGradientBoostingClassifier", "LogisticRegression", "SVC"} <= set(names)
        left_out = {"VotingClassifier", "SelfTrainingClassifier", "LinearSVC", "RandomForestRegressor"}
        assert not left_out & set(names)
        for name in names:
            assert Sklearn().check(name, {}, ()) == []

    @pytest.mark.parametrize(
        ("name", "kwargs", "path", "message"),
        [
            ("RandomForest", {}, ("model",), "did you mean 'RandomForestClassifier'?"),
            (
                "VotingClassifier",
                {},
                ("model",),
                "no classifier 'VotingClassifier' that gives probabilities and can be",
            ),
            ("LinearSVC", {}, ("model",), "no classifier 'LinearSVC' that gives probabilities"),
            ("RandomForestClassifier", {"n_estimator": 3}, ("kwargs", "n_estimator"), "did you mean 'n_estimators'?"),
            ("RandomForestClassifier", {"n_estimators": 0}, ("kwargs", "n_estimators"), "Got 0 instead"),
        ],
    )
    def test_mistakes(self, name, kwargs, path, message):
        (problem,) = Blueprint(f"sklearn:{name}", kwargs).check(("teacher",), allow_code=False)
        assert problem.path == ("teacher", *path)
        assert message in str(problem)
        with pytest.raises(ModelError):
            Blueprint(f"sklearn:{name}", kwargs).build(FACTS, seed=0)

    def test_the_seed_decides_where_no_random_state_is_given(self):
        seeds = [fitted(seed=seed).options["random_state"] for seed in (1, 1, 2)]
        assert seeds[0] == seeds[1] != seeds[2]
        assert fitted(random_state=5).options["random_state"] == 5
        assert "random_state" not in fitted("GaussianNB").options
        state = torch.get_rng_state()
        fitted(seed=3)
        assert torch.equal(torch.get_rng_state(), state)

    def test_texts_are_refused(self):
        with pytest.raises(ModelError, match="takes numbers, and this task gives texts"):
            blueprint().processor({"auto_model": "AutoModelForSequenceClassification"})
        assert blueprint().processor({"auto_model": "AutoModelForImageClassification", "in_channels": 1}) is None


class TestFitting:
    def test_it_answers_as_scikit_learn_does(self):
        inputs, labels = rows()
        model = fitted(random_state=4)
        forest = RandomForestClassifier(7, random_state=4).fit(inputs.double().numpy(), labels.numpy())
        test = torch.tensor(StandardScaler().fit_transform(WINE[0]))
        np.testing.assert_allclose(model(test).exp().numpy(), forest.predict_proba(test).clip(1e-7), rtol=1e-5)

    def test_before_it_every_class_is_as_likely(self):
        model = blueprint().build(FACTS, seed=0)
        assert not model.is_fitted
        assert torch.equal(model(rows()[0]), torch.zeros(60, 3))

    def test_rows_without_a_label_are_left_out(self):
        inputs, labels = rows()
        model, other = (blueprint("GaussianNB").build(FACTS, seed=0) for _ in range(2))
        model.fit(inputs, torch.where(torch.arange(60) < 40, labels, -100))
        other.fit(inputs[:40], labels[:40])
        assert torch.equal(model(inputs), other(inputs))
        assert model.about()["rows"] == 40

    def test_a_class_without_rows_gets_the_least_probability(self):
        inputs, labels = rows()
        model = blueprint("GaussianNB").build({"num_labels": 5}, seed=0)
        model.fit(inputs, labels + 1)
        assert model(inputs).shape == (60, 5)
        assert model(inputs)[:, [0, 4]].max() == pytest.approx(np.log(1e-7))

    def test_threads_are_for_fitting_alone(self):
        """Several threads add up the trees in any order: the answers would not be the same to the bit."""
        model = fitted(n_jobs=2)
        assert model.estimator.n_jobs == 1
        assert model.about()["parameters"]["n_jobs"] == 2

    def test_what_scikit_learn_refuses(self):
        inputs, labels = rows()
        logistic = blueprint("LogisticRegression").build(FACTS, seed=0)
        with pytest.raises(ModelError, match=r"LogisticRegression cannot be fitted: .* at least 2 classes"):
            logistic.fit(inputs, labels * 0)
        with pytest.raises(ModelError, match="SGDClassifier has no predict_proba with these options"):
            blueprint("SGDClassifier", loss="hinge").build(FACTS, seed=0).fit(inputs, labels)

    def test_its_size_is_that_of_a_file_of_joblib(self, tmp_path):
        import joblib

        model = fitted()
        joblib.dump(model.estimator, tmp_path / "forest.joblib")
        assert model.size_in_bytes == pytest.approx((tmp_path / "forest.joblib").stat().st_size, rel=0.02)


@pytest.fixture
def _forgetful(monkeypatch):
    """As in another process: nothing that was fitted is there any more."""
    monkeypatch.setattr(sklearn_models, "_FITTED", type(sklearn_models._FITTED)())


def saved(model: SklearnModel, folder, name: str = "RandomForestClassifier", **kwargs) -> None:
    card = {"task": "tabular-classification", "settings": {}, **blueprint(name, **kwargs).card(FACTS)}
    save_model(model, folder, card)


class TestOnDisk:
    @pytest.mark.parametrize(
        "name",
        [
            "RandomForestClassifier",
            "GaussianNB",
            "LogisticRegression",
            "MLPClassifier",
            "HistGradientBoostingClassifier",
            "GradientBoostingClassifier",
        ],
    )
    def test_it_comes_back_and_says_the_same(self, name, tmp_path, monkeypatch):
        kwargs = {"MLPClassifier": {"max_iter": 20}, "GradientBoostingClassifier": {"n_estimators": 5}}.get(name, {})
        model = fitted(name, **kwargs)
        saved(model, tmp_path, name, **({"n_estimators": 7} if "Forest" in name else kwargs))
        monkeypatch.setattr(sklearn_models, "_FITTED", type(sklearn_models._FITTED)())
        loaded, card = load_model(tmp_path, allow_code=False)
        assert loaded.estimator is not model.estimator
        test = torch.randn(200, 13, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(loaded(test), model(test))
        assert card["model"] == f"sklearn:{name}"
        assert loaded.options == model.options
        again = Blueprint(str(tmp_path)).build({}, seed=1)  # as the teacher of another recipe
        assert torch.equal(again(test), loaded(test))

    def test_nothing_but_tensors_and_json_is_written(self, tmp_path):
        model = fitted()
        saved(model, tmp_path, n_estimators=7)
        assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "potstill.json", "sklearn.json"}
        about = json.loads((tmp_path / "sklearn.json").read_text())
        assert about["class"] == "RandomForestClassifier"
        assert about["parameters"]["n_estimators"] == 7
        assert about["random_state"] == model.options["random_state"]
        assert about["scikit-learn"] == sklearn.__version__
        assert (about["rows"], len(about["fingerprint"])) == (60, 32)
        state = safetensors.torch.load_file(tmp_path / "model.safetensors")
        assert set(state) == {"inputs", "labels", "answers", "random_state"}
        assert torch.equal(state["inputs"], rows()[0])

    @pytest.mark.usefixtures("_forgetful")
    def test_other_answers_are_an_error(self, tmp_path, monkeypatch):
        """A later scikit-learn may grow other trees: better no teacher than another one under its name."""
        saved(fitted(), tmp_path, n_estimators=7)
        sklearn_models._FITTED.clear()
        state = safetensors.torch.load_file(tmp_path / "model.safetensors")
        safetensors.torch.save_file({**state, "random_state": torch.tensor(1)}, tmp_path / "model.safetensors")
        with pytest.raises(ModelError, match=r"answers otherwise than it did \(by up to 0\.\d+\): scikit-learn is"):
            load_model(tmp_path)

    def test_a_state_that_lacks_something_is_an_error(self, tmp_path):
        saved(fitted(), tmp_path, n_estimators=7)
        state = safetensors.torch.load_file(tmp_path / "model.safetensors")
        del state["answers"]
        safetensors.torch.save_file(state, tmp_path / "model.safetensors")
        with pytest.raises(ModelError):
            load_model(tmp_path)

    def test_what_was_not_fitted_is_not_saved(self, tmp_path):
        with pytest.raises(ModelError, match="that was fitted in a run"):
            saved(blueprint().build(FACTS, seed=0), tmp_path)
        with pytest.raises(ModelError, match="that was fitted in a run"):
            saved(nn.Linear(2, 2), tmp_path)

    @pytest.mark.usefixtures("_forgetful")
    def test_it_is_fitted_once_in_a_process(self, monkeypatch):
        count = []
        fit = RandomForestClassifier.fit
        monkeypatch.setattr(RandomForestClassifier, "fit", lambda self, *args: count.append(1) or fit(self, *args))
        first, second = fitted(random_state=1), fitted(random_state=1)
        assert len(count) == 1
        assert torch.equal(first(rows()[0]), second(rows()[0]))
        fitted(random_state=2)
        fitted(random_state=1, max_depth=2)
        assert len(count) == 3


class Centroids(ClassifierMixin, BaseEstimator):
    """A classifier of nobody's library, with options that its signature does not name."""

    def __init__(self, sharpness=1.0, random_state=None, **other):
        self.sharpness, self.random_state, self.other = sharpness, random_state, other

    def get_params(self, deep=True):
        return {"sharpness": self.sharpness, "random_state": self.random_state, **self.other}

    def fit(self, rows, labels):
        if self.sharpness < 0:
            raise RuntimeError("sharpness is negative")
        self.classes_ = np.unique(labels)
        noise = np.random.default_rng(self.random_state).normal(size=rows.shape[1])
        self.centers_ = np.stack([rows[labels == each].mean(0) for each in self.classes_]) + 0.1 * noise
        return self

    def predict_proba(self, rows):
        near = np.exp(-self.sharpness * ((rows[:, None] - self.centers_) ** 2).mean(-1))
        return near / near.sum(1, keepdims=True)


FOREIGN = f"{Centroids.__module__}.Centroids"


@pytest.fixture
def _importable(monkeypatch):
    monkeypatch.setitem(sys.modules, Centroids.__module__, sys.modules[Centroids.__module__])


class TestOtherLibraries:
    """Any class in the manner of scikit-learn, by module and name."""

    def test_it_is_fitted_saved_and_fitted_again(self, tmp_path, monkeypatch):
        model = fitted(FOREIGN, sharpness=3.0, other=1)
        inputs, labels = rows()
        own = Centroids(3.0, model.options["random_state"]).fit(inputs.double().numpy(), labels.numpy())
        np.testing.assert_allclose(model(inputs).exp().numpy(), own.predict_proba(inputs.double().numpy()), rtol=1e-5)
        saved(model, tmp_path, FOREIGN, sharpness=3.0, other=1)
        monkeypatch.setattr(sklearn_models, "_FITTED", type(sklearn_models._FITTED)())
        loaded, card = load_model(tmp_path, allow_code=True)
        assert torch.equal(loaded(inputs), model(inputs))
        assert card["model"] == f"sklearn:{FOREIGN}"
        about = json.loads((tmp_path / "sklearn.json").read_text())
        assert about[Centroids.__module__.partition(".")[0]] == "of no version"

    @pytest.mark.usefixtures("_forgetful")
    def test_one_that_forgets_its_seed_is_told(self, tmp_path, monkeypatch):
        saved(fitted(FOREIGN), tmp_path, FOREIGN)
        sklearn_models._FITTED.clear()
        fit = Centroids.fit
        monkeypatch.setattr(Centroids, "fit", lambda self, *args: fit(self.set_params(random_state=None), *args))
        with pytest.raises(ModelError, match="Centroids, fitted again to the same rows, answers otherwise than it did"):
            load_model(tmp_path)

    def test_what_is_none(self):
        for name, message in [
            ("no_such_module.Forest", "the module no_such_module cannot be imported"),
            ("sklearn.ensemble.RandomForst", "there is no such class"),
            ("sklearn.svm.LinearSVC", "it has no predict_proba"),
            (".Forest", "scikit-learn has no classifier '.Forest'"),
        ]:
            (problem,) = Sklearn().check(name, {}, ("teacher",))
            assert message in str(problem)
        assert Sklearn().check("sklearn.ensemble.RandomForestClassifier", {"n_estimators": 3}, ()) == []
        (problem,) = Sklearn().check("sklearn.ensemble.RandomForestClassifier", {"n_estimator": 3}, ())
        assert "did you mean 'n_estimators'" in str(problem)
        with pytest.raises(ModelError, match=r"Centroids cannot be fitted: sharpness is negative"):
            fitted(FOREIGN, sharpness=-1.0)

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("lightgbm.LGBMClassifier", {"n_estimators": 5, "verbosity": -1, "min_child_samples": 2, "n_jobs": 1}),
            ("xgboost.XGBClassifier", {"n_estimators": 5, "n_jobs": 1}),
            ("catboost.CatBoostClassifier", {"iterations": 5, "verbose": False, "allow_writing_files": False}),
        ],
    )
    def test_boosted_trees_of_others(self, name, options, tmp_path, monkeypatch):
        library = pytest.importorskip(name.partition(".")[0], reason=f"{name} is another library's")
        assert Sklearn().check(name, options, ()) == []
        model = fitted(name, **options)
        kind = getattr(library, name.partition(".")[2])
        inputs, labels = rows()
        own = kind(**options, random_state=model.options["random_state"]).fit(inputs.double().numpy(), labels.numpy())
        expected = own.predict_proba(inputs.double().numpy()).clip(1e-7)
        np.testing.assert_allclose(model(inputs).exp().numpy(), expected, rtol=1e-4)
        saved(model, tmp_path, name, **options)
        monkeypatch.setattr(sklearn_models, "_FITTED", type(sklearn_models._FITTED)())
        torch.testing.assert_close(load_model(tmp_path)[0](inputs), model(inputs))
        about = json.loads((tmp_path / "sklearn.json").read_text())
        assert about[name.partition(".")[0]] == library.__version__
