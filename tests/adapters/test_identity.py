"""Who may do what: tokens grant no more than their maker has, secrets open only where they were sealed, settings are checked."""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidemill.control import identity as module
from tidemill.control.identity import Directory, Identity, read_pepper
from tidemill.control.settings import Settings, load_settings
from tidemill.control.vault import Vault
from tidemill.core import tokens
from tidemill.errors import Forbidden, InvalidSetting, NotFound, Unauthorized
from tidemill.model.ids import LaunchId, OrganizationId, PrincipalId, ProjectId, TokenId
from tidemill.model.policy import Policy
from tidemill.model.tenant import Principal, PrincipalKind, Scope, Token
from tidemill.model.values import replace
from tidemill.units import MINUTE_NS, SECOND_NS

PEPPER = bytes(range(32))
NOW = 1_700_000_000 * 10**9
ORG = OrganizationId("org")
ANN = Principal(id=PrincipalId("usr_ann"), organization_id=ORG, kind=PrincipalKind.USER, name="ann", created_ns=0)
RED, BLUE, ALL = ProjectId("prj_red"), ProjectId("prj_blue"), ProjectId("")
PRIVATE = {Scope.JOB, Scope.RUNNER, Scope.GATEWAY, Scope.JOIN, Scope.OUTPOST}
SCOPES = st.sets(st.sampled_from(list(Scope))).map(lambda chosen: tuple(sorted(chosen)))
PROJECTS = st.sampled_from([ALL, RED, BLUE])
EXPIRIES = st.sampled_from([0, NOW + 10, NOW + 1_000])


def directory(*known: Token) -> Directory:
    return Directory(PEPPER, principals=[ANN], known=known)


def minted(
    granter: Identity | None = None,
    *,
    scopes: tuple[Scope, ...] = (Scope.READ,),
    project: ProjectId = ALL,
    expires_ns: int = 0,
    into: Directory | None = None,
) -> tuple[Token, str]:
    """A token, remembered."""
    book = into or directory()
    token, secret = book.mint(granter, ANN, name="t", scopes=scopes, project=project, expires_ns=expires_ns, now=NOW)
    book.remember(token, ANN)
    return token, secret


# -- tokens ----------------------------------------------------------------------------------------------------------


def powers(who: Identity, *, now: int) -> set[tuple[Scope, ProjectId]]:
    """All that an identity may do where at that instant."""
    if who.expires_ns and now >= who.expires_ns:
        return set()
    return {
        (scope, project) for scope in Scope for project in (RED, BLUE) if who.allows(scope) and who.may_see(project)
    }


def grants_no_more(mine: tuple[Any, ...], asked: tuple[Any, ...]) -> None:
    """Mint by a token of ``mine`` one of ``asked`` (scopes, project, expiry); what it can do, its maker can."""
    book = directory()
    (scopes, project, expires_ns), (wanted, where, until) = mine, asked
    _, secret = minted(scopes=scopes, project=project, expires_ns=expires_ns, into=book)
    granter = book.authenticate(secret, now=NOW)
    may = powers(granter, now=NOW)
    refused: Forbidden | None = None
    try:
        _, given = minted(granter, scopes=wanted, project=where, expires_ns=until, into=book)
    except Forbidden as error:
        refused = error
    if refused is not None:
        places = (RED, BLUE) if not where else (where,)
        too_much = any((scope, place) not in may for scope in wanted for place in places)
        beyond = granter.project_ids and where not in granter.project_ids
        assert too_much or beyond or set(wanted) & PRIVATE, f"refused for nothing: {refused}"
        return
    assert not set(wanted) & PRIVATE
    for now in (NOW, NOW + 10, NOW + 1_000, NOW + 10**18):
        try:
            made = powers(book.authenticate(given, now=now), now=now)
        except Unauthorized:
            made = set()
        assert made <= powers(granter, now=now)


@given(st.tuples(SCOPES, PROJECTS, EXPIRIES), st.tuples(SCOPES, PROJECTS, EXPIRIES))
def test_no_token_grants_more_than_it_has(mine: tuple[Any, ...], asked: tuple[Any, ...]) -> None:
    grants_no_more(mine, asked)


def minting_asks_nobody(patch: pytest.MonkeyPatch) -> None:
    mint = Directory.mint
    patch.setattr(Directory, "mint", lambda self, _granter, *args, **more: mint(self, None, *args, **more))


def admin_is_everything(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(module, "_PRIVATE", frozenset())


def time_is_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    mint = Directory.mint
    patch.setattr(
        Directory,
        "mint",
        lambda self, granter, *args, **more: mint(self, granter and replace(granter, expires_ns=0), *args, **more),
    )


def projects_are_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    mint = Directory.mint
    patch.setattr(
        Directory,
        "mint",
        lambda self, granter, *args, **more: mint(self, granter and replace(granter, project_ids=()), *args, **more),
    )


@pytest.mark.parametrize(
    "plant",
    [minting_asks_nobody, admin_is_everything, time_is_not_looked_at, projects_are_not_looked_at],
    ids=lambda bug: bug.__name__,
)
def test_a_planted_bug_is_caught(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    everything = [
        ((mine, project, until), (asked, where, till))
        for mine in ((Scope.ADMIN,), (Scope.READ,))
        for asked in ((Scope.READ,), (Scope.SUBMIT,), (Scope.RUNNER,))
        for project in (ALL, RED)
        for where in (ALL, BLUE)
        for until in (0, NOW + 10)
        for till in (0, NOW + 1_000)
    ]

    def objects(mine: tuple[Any, ...], asked: tuple[Any, ...]) -> bool:
        try:
            grants_no_more(mine, asked)
        except AssertionError:
            return True
        return False

    assert any(objects(mine, asked) for mine, asked in everything)


def test_what_a_grant_leaves_open_is_named() -> None:
    granter = Identity(principal_id=ANN.id, organization_id=ORG, name="ann", scopes=frozenset({Scope.READ}))
    with pytest.raises(Forbidden) as caught:
        minted(granter, scopes=(Scope.READ, Scope.SUBMIT))
    assert (caught.value.field, caught.value.value) == ("scopes", "submit")
    with pytest.raises(Forbidden, match="lacks the scope exec") as missing:
        granter.require(Scope.EXEC)
    assert missing.value.value == "read"


@pytest.mark.parametrize(
    "secret",
    ["", "tm_user_", "Bearer x", "tm_user_00000000000000000000000000000011IRbc", tokens.derive("run", "run_1", PEPPER),
     tokens.derive("gw", "gateway", bytes(32)), "tm_user_0000000000000000000000000000001\ud8001IRbc"],
)  # fmt: skip
def test_every_kind_of_wrong_token_gets_the_same_answer(secret: str) -> None:
    with pytest.raises(Unauthorized) as caught:
        directory().authenticate(secret, now=NOW)
    assert caught.value.detail == "This token is not valid."
    assert secret == "" or secret not in str(caught.value)


def test_a_token_ends_when_it_expires_or_is_revoked_and_only_the_hash_is_kept() -> None:
    book = directory()
    token, secret = minted(expires_ns=NOW + 10, into=book)
    assert secret not in repr(token)
    assert len(token.display) < 16
    assert book.authenticate(secret, now=NOW + 9).scopes == {Scope.READ}
    with pytest.raises(Unauthorized):
        book.authenticate(secret, now=NOW + 10)
    _, other = minted(into=book)
    kept = book.authenticate(other, now=NOW)
    assert (kept.name, kept.principal_id, kept.project_ids, kept.launch_id) == ("ann", ANN.id, (), "")
    version = book.version
    revoked = book.revoked(token.id, ORG, now=NOW + 1)
    assert book.authenticate(secret, now=NOW).scopes, "it is revoked once that is stored"
    book.remember(revoked, ANN)
    assert book.version > version, "the gateway is told"
    with pytest.raises(Unauthorized):
        book.authenticate(secret, now=NOW)
    assert book.revoked(token.id, ORG, now=NOW + 5).revoked_ns == NOW + 1, "twice is harmless"
    with pytest.raises(NotFound):
        book.revoked(token.id, OrganizationId("another"), now=NOW)
    with pytest.raises(NotFound):
        book.revoked(TokenId("tok_none"), ORG, now=NOW)


def test_a_token_made_with_another_key_opens_nothing() -> None:
    token, secret = minted()
    assert directory(token).authenticate(secret, now=NOW)
    with pytest.raises(Unauthorized):
        Directory(bytes(32), principals=[ANN], known=[token]).authenticate(secret, now=NOW)


def test_a_token_without_a_principal_opens_nothing() -> None:
    token, secret = minted()
    with pytest.raises(Unauthorized):
        Directory(PEPPER, principals=[], known=[token]).authenticate(secret, now=NOW)


def test_a_launchs_tokens_open_their_launch_and_are_the_same_after_a_restart() -> None:
    launch = LaunchId("run_1-0-1-0")
    book = directory()
    runner, job = book.launch_tokens(launch, organization=ORG, project=RED, principal=ANN.id)
    for secret, scope in ((runner, Scope.RUNNER), (job, Scope.JOB)):
        who = book.authenticate(secret, now=NOW)
        assert (who.launch_id, who.scopes, who.project_ids) == (launch, {scope}, (RED,))
        assert not any(who.allows(other) for other in Scope if other is not scope)
        assert not who.may_see(BLUE)
        with pytest.raises(Forbidden):
            minted(who, scopes=(scope,), project=RED)
    again = directory()
    with pytest.raises(Unauthorized):
        again.authenticate(runner, now=NOW)
    assert again.launch_tokens(launch, organization=ORG, project=RED, principal=ANN.id) == (runner, job)
    assert again.authenticate(runner, now=NOW) == book.authenticate(runner, now=NOW)


def test_only_so_many_launches_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REMEMBERED_LAUNCHES", 4)
    book = directory()
    made = [
        book.launch_tokens(LaunchId(f"run_{number}"), organization=ORG, project=RED, principal=ANN.id)
        for number in range(3)
    ]
    with pytest.raises(Unauthorized):
        book.authenticate(made[0][0], now=NOW)
    assert book.authenticate(made[2][1], now=NOW)


def test_the_gateways_token_reads_routes_and_nothing_else() -> None:
    book = directory()
    who = book.authenticate(book.gateway_token, now=NOW)
    assert [scope for scope in Scope if who.allows(scope)] == [Scope.GATEWAY]


# -- the key and the secrets -----------------------------------------------------------------------------------------


def test_the_key_is_made_once_whole_and_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "secret.key"
    (tmp_path / "secret.new").write_text("half a k")
    pepper = read_pepper(path, create=True)
    assert len(pepper) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_pepper(path, create=True) == read_pepper(path, create=False) == pepper
    assert [entry.name for entry in tmp_path.iterdir()] == ["secret.key"]


@pytest.mark.parametrize(
    ("content", "mode", "sentence"),
    [
        (None, 0, "missing"), ("ab" * 32, 0o644, "readable by others"), ("ab" * 32, 0o660, "readable by others"),
        ("ab" * 31, 0o600, "too short"), ("", 0o600, "too short"), ("not hexadecimal", 0o600, "damaged"), ("é" * 64, 0o600, "damaged"),
    ],
)  # fmt: skip
def test_a_key_that_cannot_be_trusted_is_refused(tmp_path: Path, content: str | None, mode: int, sentence: str) -> None:
    path = tmp_path / "secret.key"
    if content is not None:
        path.write_text(content)
        path.chmod(mode)
    with pytest.raises(InvalidSetting, match=sentence) as caught:
        read_pepper(path, create=False)
    assert caught.value.field == str(path)
    assert caught.value.mend


@given(st.text())
def test_a_secret_opens_to_what_was_sealed_and_shows_nothing(value: str) -> None:
    value = value.encode(errors="replace").decode()
    vault = Vault(PEPPER)
    secret = vault.seal(RED, "KEY", value, now=NOW)
    assert vault.open(secret) == value
    assert (secret.project_id, secret.name, secret.updated_ns) == (RED, "KEY", NOW)
    assert len(value) < 4 or value.encode() not in secret.sealed
    assert vault.seal(RED, "KEY", value, now=NOW).sealed != secret.sealed, "the same twice does not show"


@pytest.mark.parametrize(
    ("pepper", "changes"),
    [
        (bytes(32), {}), (PEPPER, {"project_id": BLUE}), (PEPPER, {"name": "OTHER"}), (PEPPER, {"sealed": b""}),
        (PEPPER, {"sealed": b"short"}), (PEPPER, {"sealed": bytes(64)}),
    ],
)  # fmt: skip
def test_a_secret_that_was_moved_or_damaged_or_has_another_key_does_not_open(
    pepper: bytes, changes: dict[str, Any]
) -> None:
    secret = replace(Vault(PEPPER).seal(RED, "KEY", "value", now=NOW), **changes)
    with pytest.raises(InvalidSetting) as caught:
        Vault(pepper).open(secret)
    assert caught.value.field == secret.name
    assert "tidemill secret set" in caught.value.mend


def test_one_changed_bit_of_a_secret_is_noticed() -> None:
    secret = Vault(PEPPER).seal(RED, "KEY", "value", now=NOW)
    for place in range(len(secret.sealed)):
        sealed = bytearray(secret.sealed)
        sealed[place] ^= 1
        with pytest.raises(InvalidSetting):
            Vault(PEPPER).open(replace(secret, sealed=bytes(sealed)))


# -- settings --------------------------------------------------------------------------------------------------------


def test_without_a_file_settings_are_the_defaults(tmp_path: Path) -> None:
    assert load_settings(tmp_path, {}) == Settings(home=tmp_path)
    (tmp_path / "config.yaml").write_text("# nothing yet\n")
    assert load_settings(tmp_path, {"port": None}) == Settings(home=tmp_path)


def test_the_file_is_read_and_what_is_given_wins(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "port: 8080\npue: 1.4\ncountry:\nhosts: gpu.lan\nrates: {H100: 2.5, cpu: 0.01}\nmeter_every: 30\nengine: local\n"
    )
    found = load_settings(tmp_path, {"port": 9090, "gateway_port": None})
    assert (found.port, found.gateway_port, found.pue, found.hosts) == (9090, 7071, 1.4, ("gpu.lan",))
    assert found.rates == {"H100": 2.5, "cpu": 0.01}
    assert found.country == "", "a name without a value is the default"
    assert found.policy.meter_every_ns == MINUTE_NS // 2
    assert found.api_url == "http://127.0.0.1:9090"
    assert found.database_url == f"sqlite:///{tmp_path}/control.db"


@pytest.mark.parametrize(
    ("text", "field", "value", "sentence"),
    [
        ("prot: 1", "prot", 1, "Did you mean port?"),
        ("zzz: 1", "zzz", 1, "Settings are"),
        ("home: /tmp", "home", "/tmp", "no such setting"),
        ("1: 2", "1", 2, "no such setting"),
        ("port: 70000", "port", 70_000, "between 1 and 65535"),
        ("port: -1", "port", -1, "between 1 and 65535"),
        ("port: many", "port", "many", "many"),
        ("port: yes", "port", True, "yes or no"),
        ("port: [1]", "port", [1], "list"),
        ("pue: 0.9", "pue", 0.9, "1.0"),
        ("pue: .nan", "pue", None, "1.0"),
        ("pue: .inf", "pue", None, "1.0"),
        ("carbon_g_per_kwh: -1", "carbon_g_per_kwh", -1, "zero or more"),
        ("carbon_g_per_kwh: .nan", "carbon_g_per_kwh", None, "zero or more"),
        ("reserve_cpus: -0.5", "reserve_cpus", -0.5, "zero or more"),
        ("reserve_cpus: .inf", "reserve_cpus", None, "zero or more"),
        ("rates: {cpu: cheap}", "rates", {"cpu": "cheap"}, "cheap"),
        ("rates: 5", "rates", 5, "int"),
        ("hosts: 5", "hosts", 5, "int"),
        ("meter_every: 0s", "meter_every", "0s", "longer than nothing"),
        ("meter_every: soon", "meter_every", "soon", "duration"),
        ("workdir_limit: 2 bananas", "workdir_limit", "2 bananas", "size"),
        ("engine: slurm", "engine", "slurm", "engines are local, ray and none"),
        ("backfill: 1", "backfill", 1, "true or false"),
        ("half_life: yes", "half_life", True, "yes or no"),
        ("half_life: -3", "half_life", -3, "negative"),
        ("replan: 0", "replan", 0, "longer than nothing"),
        ("starts_per_turn: 0", "starts_per_turn", 0, "one or more"),
        ("flap_losses: 2.5", "flap_losses", 2.5, "whole number"),
        ("flap_losses: []", "flap_losses", [], "list"),
        ("labels: 5", "labels", 5, "int"),
        ("labels: {zone: 'a b'}", "labels", {"zone": "a b"}, "as the value of zone"),
        ("labels: {'': a}", "labels", {"": "a"}, "letters"),
        ("taints: 'gpu=a=b'", "taints", "gpu=a=b", "as the value of gpu"),
        ("rack: r 1", "rack", "r 1", "letters"),
        ("site_kind: moon", "site_kind", "moon", "onprem, cloud and edge"),
        ("database: {a: b}", "database", {"a": "b"}, "one word"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_its_mend(
    tmp_path: Path, text: str, field: str, value: object, sentence: str
) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(InvalidSetting) as caught:
        load_settings(tmp_path, {})
    assert caught.value.field == field
    assert value is None or caught.value.value == value
    assert sentence in str(caught.value)
    assert caught.value.mend


def test_every_number_that_steers_decisions_is_a_setting(tmp_path: Path) -> None:
    assert Settings(home=tmp_path).policy == Policy(), "the defaults agree"
    changed: dict[str, Any] = {}
    for item in fields(Policy):
        default: Any = item.default
        name = item.name.removesuffix("_ns")
        if name != item.name:
            changed[name] = f"{default // SECOND_NS + 7}s"
        else:
            changed[name] = (
                not default if isinstance(default, bool) else f"{default}x" if isinstance(default, str) else 9
            )
    found = load_settings(tmp_path, changed).policy
    for item in fields(Policy):
        assert getattr(found, item.name) != item.default, f"{item.name} is not set by {changed}"
    assert found.half_life_ns == Policy().half_life_ns + 7 * SECOND_NS
    assert load_settings(tmp_path, {"half_life": 0, "preemption": False}).policy == replace(
        Policy(), half_life_ns=0, preemption=False
    )


def test_a_machine_says_where_it_stands_and_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "labels: {zone: a, pool: ''}\ntaints: [gpu=h100, noisy]\nrack: 7\nblock: b/1\nmig_dynamic: 0\nengine: simulated\n"
    )
    found = load_settings(tmp_path, {})
    assert (found.labels, found.taints) == ({"zone": "a", "pool": ""}, ("gpu=h100", "noisy"))
    assert (found.rack, found.block, found.mig_dynamic, found.engine) == ("7", "b/1", ("0",), "simulated")


@pytest.mark.parametrize("content", [b"- a\n- b\n", b"just words", b"a: [", b"\xff\xfe\x00", None])
def test_a_file_that_holds_no_settings_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "config.yaml"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(InvalidSetting) as caught:
        load_settings(tmp_path, {})
    assert caught.value.field == str(path)
    assert "name: value" in caught.value.mend
