"""Every setting is read, checked and named; keys are never shown."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from coordinator.domain.errors import StartError
from coordinator.domain.plan import TrainingPlan
from coordinator.domain.plan_words import DELTA_ONLY
from coordinator.settings import PREFIX, CoordinatorSettings

KEY = "k" * 31 + "!"

#: Variable: value as written, value as read.
GOOD = {
    "DATA": ("/srv/data", Path("/srv/data")),
    "CORPUS": ("/srv/corpus", Path("/srv/corpus")),
    "HOST": ("::1", "::1"),
    "PORT": ("0", 0),
    "ALLOWED_HOSTS": ("Fleet.lan, ::2", frozenset({"fleet.lan", "::2"})),
    "INSECURE_HTTP": ("true", True),
    "WORKER_API_KEY": (KEY, KEY),
    "WORKER_API_KEY_NEXT": (KEY, KEY),
    "METRICS_TOKEN": (KEY, KEY),
    "PRESET": ("medium", "medium"),
    "SEED": ("0", 0),
    "TOKEN_BUDGET": ("1000000", 1000000),
    "HEARTBEAT_S": ("2.5", 2.5),
    "KEEP_VERSIONS": ("1", 1),
    "ROLL_BACK": ("alarm", "alarm"),
    "LOG_LEVEL": ("DEBUG", "debug"),
}
GOOD_PLAN = {
    "LOCAL_OPTIMISER": ("adamw", "adamw"),
    "LOCAL_MOMENTUM": ("0.9", 0.9),
    "LEARNING_RATE": ("0.01", 0.01),
    "WARMUP_TOKENS": ("0", 0),
    "SCHEDULE_TOKENS": ("1000000", 1000000),
    "SECOND_STAGE_AT": ("0.25", 0.25),
    "SECOND_STAGE_RATE": ("1", 1.0),
    "WEIGHT_DECAY": ("0", 0.0),
    "BETA1": ("0.5", 0.5),
    "BETA2": ("0.5", 0.5),
    "EPS": ("1e-6", 1e-6),
    "CLIP_NORM": ("2", 2.0),
    "OUTER_RATE": ("1", 1.0),
    "OUTER_MOMENTUM": ("0", 0.0),
    "BATCH_SIZE": ("4", 4),
    "ROUND_S": ("30", 30.0),
    "ROUND_MIN_S": ("2.5", 2.5),
    "ROUND_MAX_S": ("60", 60.0),
    "QUORUM": ("0.7", 0.7),
    "AGGREGATION": ("per-arrival", "per-arrival"),
    "ACCEPT_LATE": ("stale", "stale"),
    "CODEC": ("ternary", "ternary"),
    "ROUND_KIND": ("gradient", "gradient"),
    "BROADCAST": ("ternary", "ternary"),
    "EVALUATE_EVERY": ("1", 1),
}
BAD = [
    ("PORT", "65536"),
    ("PORT", "-1"),
    ("PORT", "http"),
    ("PORT", "1.5"),
    ("PORT", "\u0663"),
    ("ALLOWED_HOSTS", "a b"),
    ("ALLOWED_HOSTS", "box:5000"),
    ("INSECURE_HTTP", "yes"),
    ("INSECURE_HTTP", "True"),
    ("SEED", "-1"),
    ("SEED", str(2**62 + 1)),
    ("TOKEN_BUDGET", "1e6"),
    ("HEARTBEAT_S", "0"),
    ("HEARTBEAT_S", "nan"),
    ("HEARTBEAT_S", "inf"),
    ("HEARTBEAT_S", "60.1"),
    ("HEARTBEAT_S", "soon"),
    ("KEEP_VERSIONS", "0"),
    ("ROLL_BACK", "always"),
    ("LOG_LEVEL", "loud"),
    ("LEARNING_RATE", "0"),
    ("LEARNING_RATE", "fast"),
    ("LEARNING_RATE", "inf"),
    ("WARMUP_TOKENS", "-1"),
    ("SCHEDULE_TOKENS", "-1"),
    ("SCHEDULE_TOKENS", "200000"),  # the warm-up is half of that
    ("SECOND_STAGE_AT", "1"),
    ("SECOND_STAGE_RATE", "0"),
    ("BETA1", "1"),
    ("OUTER_MOMENTUM", "1"),
    ("BATCH_SIZE", "0"),
    ("BATCH_SIZE", "2.5"),
    ("ROUND_S", "nan"),
    ("ROUND_S", "0"),
    ("ROUND_S", "Auto"),
    ("ROUND_MIN_S", "0"),
    ("ROUND_MIN_S", "auto"),
    ("ROUND_MIN_S", "601"),
    ("ROUND_MAX_S", "inf"),
    ("QUORUM", "0"),
    ("QUORUM", "1.1"),
    ("ACCEPT_LATE", "always"),
    ("CODEC", "int4"),
    ("ROUND_KIND", "gradients"),
    ("LOCAL_OPTIMISER", "Muon"),
    ("LOCAL_MOMENTUM", "1"),
    ("BROADCAST", "fp32"),
    ("AGGREGATION", "arrival"),
    ("EVALUATE_EVERY", "0"),
]


WHOLE = [
    "WARMUP_TOKENS",
    "SCHEDULE_TOKENS",
    "BATCH_SIZE",
    "EVALUATE_EVERY",
    "TOKEN_BUDGET",
]


def read(**given: str) -> CoordinatorSettings:
    return CoordinatorSettings.from_env({PREFIX + k: v for k, v in given.items()})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ACCEPT_LATE", "never, round, stale"),
        ("ROUND_KIND", "delta, gradient"),
        ("AGGREGATION", "rounds, per-arrival"),
        ("CODEC", "ternary, int8, fp32"),
        ("ROLL_BACK", "never, alarm"),
        ("BROADCAST", "exact, ternary, int8"),
        ("LOG_LEVEL", "debug, info, warning, error"),
    ],
)
def test_a_wrong_word_is_shown_with_those_that_there_are(name, words):
    with pytest.raises(StartError) as caught:
        read(**{name: "bogus"})

    assert str(caught.value) == f"{PREFIX}{name} must be one of {words}, got 'bogus'"


def test_a_round_time_is_a_number_or_the_word_that_leaves_it_to_the_coordinator():
    assert read(ROUND_S="auto").plan.round_s == "auto"
    with pytest.raises(StartError) as caught:
        read(ROUND_S="soon")

    assert str(caught.value) == (
        f"{PREFIX}ROUND_S must be auto or a number of seconds above 0, at most 1e+09, "
        "got 'soon'"
    )


def test_bounds_the_wrong_way_round_are_shown_both():
    with pytest.raises(StartError) as caught:
        read(ROUND_MAX_S="5")

    assert str(caught.value) == (
        f"{PREFIX}ROUND_MAX_S can't be '5': round_min_s (10) must be at most "
        "round_max_s (5)"
    )


@pytest.mark.parametrize("name", GOOD)
def test_every_setting_is_read(name):
    written, due = GOOD[name]

    settings = read(**{name: written})

    assert getattr(settings, name.lower()) == due
    assert settings != read()


@pytest.mark.parametrize("name", GOOD_PLAN)
def test_every_number_of_the_plan_is_read(name):
    written, due = GOOD_PLAN[name]

    plan = read(**{name: written}).plan

    assert getattr(plan, name.lower()) == due
    assert plan != TrainingPlan()


def test_arrivals_have_no_momentum_unless_one_is_asked_for_and_refused():
    assert read(AGGREGATION="per-arrival").plan.outer_momentum == 0.0
    with pytest.raises(StartError, match=r"OUTER_MOMENTUM can't be '0.8': .*arrival"):
        read(AGGREGATION="per-arrival", OUTER_MOMENTUM="0.8")
    with pytest.raises(StartError, match=r"ROUND_KIND can't be 'gradient': .*arrival"):
        read(AGGREGATION="per-arrival", ROUND_KIND="gradient")


def test_the_rate_that_nobody_sets_is_the_usual_one_of_the_kind_of_round():
    assert read().plan.learning_rate == 2e-3
    assert read(ROUND_KIND="delta").plan.learning_rate == 2e-3
    assert read(ROUND_KIND="gradient").plan.learning_rate == 2e-2
    chosen = read(ROUND_KIND="gradient", LEARNING_RATE="0.005").plan
    assert chosen.learning_rate == 0.005


@pytest.mark.parametrize("name", DELTA_ONLY)
def test_what_gradient_rounds_have_none_of_is_refused_with_them(name):
    word, _ = GOOD_PLAN[name.upper()]
    with pytest.raises(StartError) as caught:
        read(ROUND_KIND="gradient", **{name.upper(): word})

    assert str(caught.value) == (
        f"{PREFIX}{name.upper()} means nothing in gradient rounds, got {word!r}"
    )


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_number_that_no_plan_can_be_computed_with_is_refused(name):
    with pytest.raises(StartError, match=rf"{name} must be a whole number from . to"):
        read(**{name: "9" * 400})


def test_there_is_no_setting_that_these_tests_leave_out():
    fields = {field.name.upper() for field in dataclasses.fields(CoordinatorSettings)}

    assert fields - {"PLAN"} == set(GOOD)
    assert {name.upper() for name in TrainingPlan.__struct_fields__} == set(GOOD_PLAN)


def test_without_a_variable_there_are_the_defaults():
    settings = CoordinatorSettings.from_env({"PATH": "/bin", "BITNET_THREADS": "2"})

    assert (settings.data, settings.corpus) == (Path("data"), Path("corpus"))
    assert (settings.host, settings.port) == ("127.0.0.1", 5000)
    assert (settings.seed, settings.token_budget) == (1, None)
    assert (settings.preset, settings.worker_api_key) == (None, None)
    assert (settings.heartbeat_s, settings.keep_versions) == (5.0, 20)
    assert settings.plan == TrainingPlan()


@pytest.mark.parametrize("name", [*GOOD, *GOOD_PLAN])
def test_an_empty_variable_counts_as_not_set(name):
    assert read(**{name: "  "}) == read()


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_wrong_value_is_named_and_shown(name, value):
    with pytest.raises(StartError) as caught:
        read(**{name: value})

    message = str(caught.value)
    assert PREFIX + name in message
    assert repr(value) in message
    assert "\n" not in message
    assert caught.value.exit_code == 2


def test_an_unknown_preset_is_answered_with_the_nearest():
    with pytest.raises(StartError, match=r"PRESET.*'smol'.*did you mean 'small'"):
        read(PRESET="smol")


def test_an_unknown_name_is_refused_and_the_known_ones_listed():
    with pytest.raises(
        StartError, match="BITNET_COORD_PROT is not a setting"
    ) as caught:
        read(PROT="5000")

    for name in (*GOOD, *GOOD_PLAN):
        assert name in str(caught.value)


@pytest.mark.parametrize("name", ["WORKER_API_KEY", "WORKER_API_KEY_NEXT"])
@pytest.mark.parametrize("key", ["secret-but-short", "secret " * 8, "sécret" * 8])
def test_a_weak_key_is_refused_and_never_shown(name, key):
    with pytest.raises(StartError, match=f"{PREFIX}{name} must have at least 32") as e:
        read(**{name: key})

    assert "cret" not in str(e.value)


def test_no_key_is_in_the_repr():
    settings = read(WORKER_API_KEY=KEY, WORKER_API_KEY_NEXT=KEY, METRICS_TOKEN=KEY)

    assert KEY not in repr(settings)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_needs_nobody_to_allow_it(host):
    settings = read(HOST=host)

    assert settings.is_loopback
    settings.check_reach()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "fleet.lan"])
def test_an_address_beyond_this_machine_has_to_be_allowed(host):
    assert not read(HOST=host).is_loopback
    with pytest.raises(StartError, match="insecure-http"):
        read(HOST=host).check_reach()
    read(HOST=host, INSECURE_HTTP="true").check_reach()
