"""Job keys, seeds and hashes: the identities behind paying once and reproducible results."""

import hashlib

import orjson
from hypothesis import given
from hypothesis import strategies as st

from batch.fal.endpoint import APP_ID
from batch.manifest.hashing import canonical_json, content_hash, derived_seed, job_key

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=8), JSON, max_size=6)


def test_a_job_key_never_changes_between_versions() -> None:
    """A change would make finished jobs look new, so they would be paid for again: these values are frozen."""
    complete = {"prompt": "as a fresco", "image_url": "https://a/b.png", "strength": 0.75, "seed": 7}
    assert (
        canonical_json(complete) == b'{"image_url":"https://a/b.png","prompt":"as a fresco","seed":7,"strength":0.75}'
    )
    assert job_key(APP_ID, complete) == "844bc1a5eaa6f2cf11649e6ac15c6d47"
    assert derived_seed(0, "id\n7", "base") == 755_790_092


@given(OBJECTS, st.randoms(use_true_random=False))
def test_the_order_of_inputs_does_not_matter(value, random) -> None:
    """Equal objects have the same canonical JSON and key."""
    items = list(value.items())
    random.shuffle(items)
    assert canonical_json(dict(items)) == canonical_json(value)
    assert job_key(APP_ID, dict(items)) == job_key(APP_ID, value)
    assert orjson.loads(canonical_json(value)) == value


@given(OBJECTS, OBJECTS)
def test_other_inputs_have_other_keys(left, right) -> None:
    """Two jobs share a key only if they are the same job."""
    assert (job_key(APP_ID, left) == job_key(APP_ID, right)) == (canonical_json(left) == canonical_json(right))


def test_another_app_is_another_job() -> None:
    """The app id is part of the key."""
    assert job_key(APP_ID, {"seed": 1}) != job_key("fal-ai/flux/schnell", {"seed": 1})


@given(st.integers(0, 2**63), st.text(), st.text(alphabet=st.characters(exclude_characters="\n"), max_size=9))
def test_a_derived_seed_has_31_bits_and_stays(run_seed, identity, cell) -> None:
    """The same run seed, row and cell always give the same seed."""
    seed = derived_seed(run_seed, identity, cell)
    assert 0 <= seed < 2**31
    assert seed == derived_seed(run_seed, identity, cell)


def test_run_seed_row_and_cell_each_change_the_seed() -> None:
    """All three are part of the hash."""
    seeds = {derived_seed(*parts) for parts in [(0, "a", "x"), (1, "a", "x"), (0, "b", "x"), (0, "a", "y")]}
    assert len(seeds) == 4


def test_seeds_fill_their_range() -> None:
    """A thousand seeds have almost no collisions and use both halves of the range."""
    seeds = [derived_seed(0, str(row), "base") for row in range(1000)]
    assert len(set(seeds)) >= 999
    assert 400 < sum(seed >= 2**30 for seed in seeds) < 600


def test_the_content_hash_is_sha256() -> None:
    """Any other tool computes the same hash."""
    assert content_hash(b"image") == hashlib.sha256(b"image").hexdigest()
