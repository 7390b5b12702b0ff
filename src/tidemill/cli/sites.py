"""Machines and places: ``join``, ``leave``, ``site`` and ``lost``."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from tidemill.cli.output import age, clock, count, emit, facts, note, paint, say, state, table
from tidemill.cli.parsing import Json, group_of
from tidemill.cli.ticker import Ticker
from tidemill.errors import InvalidRequest, InvalidSetting
from tidemill.sdk import connection
from tidemill.sdk.client import Client
from tidemill.units import format_bandwidth, format_duration, format_usd, parse_size

_Home = Annotated[
    Path | None,
    typer.Option("--home", metavar="FOLDER", help="Of this machine's outpost; ~/.tidemill/outpost unless set."),
]
_Words = Annotated[list[str] | None, typer.Option("--label", metavar="NAME=VALUE", help="Repeatable.")]
_SLURM = ("partition", "account", "qos", "reservation", "constraint", "python", "rest", "rest_user", "rest_token")
_SiteName = Annotated[str, typer.Argument(metavar="SITE", help="Its name; see tidemill site list.")]


def join_command(
    host: Annotated[str, typer.Argument(metavar="HOST", help="Of the control plane: 10.0.0.5, head:7070 or a URL.")],
    token: Annotated[
        str, typer.Option("--token", metavar="TOKEN", envvar="TIDEMILL_JOIN_TOKEN", help="From tidemill site token.")
    ],
    name: Annotated[
        str, typer.Option("--name", metavar="NAME", help="Of this machine; its host name unless set.")
    ] = "",
    address: Annotated[
        str, typer.Option("--address", metavar="IP", help="Where other machines reach this one; found unless set.")
    ] = "",
    label: _Words = None,
    taint: Annotated[list[str] | None, typer.Option("--taint", metavar="KEY[=VALUE]", help="Repeatable.")] = None,
    rack: Annotated[str, typer.Option("--rack", metavar="NAME", help="Where it stands.")] = "",
    block: Annotated[str, typer.Option("--block", metavar="NAME", help="The block of racks.")] = "",
    volumes: Annotated[
        Path | None,
        typer.Option(
            "--volumes", metavar="FOLDER", help="Shared with the other machines: checkpoints and outputs of jobs."
        ),
    ] = None,
    data_cache: Annotated[
        str, typer.Option("--data-cache", metavar="SIZE", help="What copies of data sets may take here.")
    ] = "100GB",
    slurm: Annotated[
        list[str] | None,
        typer.Option(
            "--slurm",
            metavar="NAME=VALUE",
            help="partition, account, qos, reservation, constraint, python; slurmrestd: rest, rest_user, rest_token.",
        ),
    ] = None,
    kubernetes: Annotated[
        list[str] | None,
        typer.Option(
            "--kubernetes",
            metavar="NAME=VALUE,…",
            help="namespace, queue, image, volumes, select, service_account, priority_class, runtime_class, kubeconfig,"
            " context, api_url, user or host_network.",
        ),
    ] = None,
    reserve_cpus: Annotated[float, typer.Option("--reserve-cpus", metavar="N", help="Cores kept from jobs.")] = 0.0,
    ca: Annotated[
        Path | None,
        typer.Option(
            "--ca",
            metavar="FILE",
            envvar="TIDEMILL_JOIN_CA",
            help="PEM: the authority of the control plane's certificate.",
        ),
    ] = None,
    fingerprint: Annotated[
        str, typer.Option("--fingerprint", metavar="SHA256", help="Of the control plane's own certificate.")
    ] = "",
    home: _Home = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", "-f", help="Stay in this terminal, as a service does.")
    ] = False,
    json: Json = False,
) -> None:
    """Make this machine part of a cloud. It only ever dials out to the control plane."""
    from tidemill.outpost import joining, main
    from tidemill.outpost.config import OutpostConfig

    folder = _home(home)
    url = joining.url_of(host)
    asked = OutpostConfig(
        control_url=url,
        ca=joining.vouching(url, ca=ca, fingerprint=fingerprint),
        key="",
        node_id="",
        name=name or socket.gethostname(),
        address=address or joining.own_address(url),
        labels=tuple(sorted(_pair(each) for each in label or [])),
        taints=tuple(taint or ()),
        rack=rack,
        block=block,
        reserve_cpus=reserve_cpus,
        volumes=_volumes(volumes),
        data_cache=_data_cache(data_cache),
        settings=tuple(sorted([*_slurm(slurm or []), *_kubernetes(kubernetes or [])])),
    )
    with Ticker("joining", is_silent=json):
        config = joining.join(folder, token, asked)
        joining.stop_outpost(folder)
        if not foreground:
            joining.start_outpost(folder)
    if json:
        emit({"name": config.name, "site": config.site, "engine": config.engine, "home": str(folder)})
    else:
        say(paint(f"{config.name} is part of {config.site}", "green"))
        facts([("control plane", url), ("address", config.address), ("home", str(folder))])
        note("  tidemill leave takes it out again")
    if foreground:
        main.run(folder)


def leave_command(
    home: _Home = None,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="S", help="For its jobs to end; no limit unless set.")
    ] = 0.0,
    json: Json = False,
) -> None:
    """Take this machine out of its cloud: it is drained first, and nothing is lost."""
    from tidemill.outpost import joining

    with Ticker("leaving", is_silent=json) as ticker:
        config = joining.leave(
            _home(home), told=lambda running: ticker.say(f"{count(running, 'job')} to go"), patience_s=timeout
        )
    if json:
        emit({"name": config.name, "site": config.site, "left": True})
    else:
        say(f"{config.name} has left {config.site}")


def lost_command(
    node: Annotated[str, typer.Argument(metavar="MACHINE", help="Its name; see tidemill nodes.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Say that a silent machine is gone for good: what it had is started elsewhere."""
    if not yes and not json:
        say(f"If {node} runs on somewhere, its jobs would run twice. Be sure that it is off.")
        typer.confirm("Is it?", abort=True)
    with Client() as client:
        found = client.declare_lost(node)
    if json:
        emit(found.to_json())
    else:
        say(f"{state(found.state)} {found.name}: what it had is started elsewhere")


def site_list(json: Json = False) -> None:
    """The sites with their machines."""
    with Client() as client:
        sites = client.sites()
    if json:
        emit([site.to_json() for site in sites])
        return
    rows = [
        (
            site.name,
            site.kind,
            site.engine,
            site.country,
            str(site.nodes) + (f" ({site.silent} silent)" if site.silent else ""),
            format_duration(site.lease_ns) if site.lease_ns else "none",
            f"{len(site.prices)} own" if site.prices else "",
            f"{format_usd(site.tariff_micro_per_kwh)}/kWh" if site.tariff_micro_per_kwh else "",
            f"{site.carbon_g_per_kwh:g} g/kWh{', by the hour' if site.carbon_g_by_hour else ''}" if sites[1:] else "",
            ", ".join(_link_row(link) for link in site.links),
            ", ".join(f"{one.get('name')}{'' if one.get('is_there') else ' (away)'}" for one in site.outposts),
        )
        for site in sites
    ]
    about = ("name", "kind", "engine", "country", "machines", "lease")
    headings = (*about, "prices", "tariff", "carbon", "links", "outposts")
    table(headings, rows, flexible=10)


def _link_row(link: Mapping[str, Any]) -> str:
    rate = f", {format_bandwidth(int(link['bits_per_s']))}" if link.get("bits_per_s") else ""
    return f"{link.get('site')} {int(link.get('latency_ns', 0)) / 1e6:g} ms{rate}"


def site_set(
    name: _SiteName,
    kind: Annotated[
        str | None, typer.Option("--kind", metavar="KIND", help="onprem, cloud or edge; onprem for a new one.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option("--engine", metavar="ENGINE", help="local, ray, slurm or kubernetes; local for a new one."),
    ] = None,
    country: Annotated[str | None, typer.Option("--country", metavar="XXX", help="ISO 3166, three letters.")] = None,
    pue: Annotated[float | None, typer.Option("--pue", metavar="N", help="Facility power over IT power.")] = None,
    carbon: Annotated[
        float | None, typer.Option("--carbon", metavar="G", help="g CO2e per kWh; the country's unless set.")
    ] = None,
    carbon_by_hour: Annotated[
        str | None,
        typer.Option(
            "--carbon-by-hour", metavar="G,G,…", help="24 of them, by hour of the day in UTC; none: no hours."
        ),
    ] = None,
    lease: Annotated[
        str | None,
        typer.Option(
            "--lease", metavar="TIME", help="A worker without a word from the control plane ends itself after this."
        ),
    ] = None,
    price: Annotated[
        list[str] | None,
        typer.Option(
            "--price", metavar="NAME=USD", help="An hour of a GPU model, or of cpu; repeatable. none: no own prices."
        ),
    ] = None,
    tariff: Annotated[
        float | None, typer.Option("--tariff", metavar="USD", help="For a kWh, charged on top of the prices.")
    ] = None,
    json: Json = False,
) -> None:
    """Add a site, or describe one anew; what is left out stays as it is."""
    with Client() as client:
        site = client.put_site(
            name,
            kind=kind,
            engine=engine,
            country=country,
            pue=pue,
            carbon_g_per_kwh=carbon,
            carbon_by_hour=_hours(carbon_by_hour) if carbon_by_hour is not None else None,
            lease=lease,
            prices=_prices(price) if price is not None else None,
            tariff=tariff,
        )
    if json:
        emit(site.to_json())
    else:
        whole = {name: micro for name, micro in site.prices.items() if not name.startswith("MIG-")}
        own = ", ".join(f"{name} {format_usd(micro)}/h" for name, micro in whole.items())
        say(f"{site.name}: {site.kind}, engine {site.engine}" + (f", {own}" if own else ""))
        note(f"  tidemill site token {site.name} makes the command with which machines join it")


def site_link(
    one: _SiteName,
    other: Annotated[str, typer.Argument(metavar="OTHER", help="The other site's name.")],
    latency: Annotated[str, typer.Option("--latency", metavar="TIME", help="There and back, such as 20ms.")] = "0s",
    bandwidth: Annotated[str, typer.Option("--bandwidth", metavar="RATE", help="Such as 1Gbps.")] = "",
    remove: Annotated[bool, typer.Option("--remove", help="Forget what was said of it.")] = False,
    json: Json = False,
) -> None:
    """Say how far two sites are from each other, and how much gets through."""
    with Client() as client:
        site = (
            client.unlink_sites(one, other)
            if remove
            else client.link_sites(one, other, latency=latency, bandwidth=bandwidth)
        )
    if json:
        emit(site.to_json())
    elif remove:
        say(f"{one} – {other}: nothing is known of the way")
    else:
        rate = f", {bandwidth}" if bandwidth else ""
        say(f"{one} – {other}: {latency}{rate}")


def site_token(
    name: _SiteName,
    expires_in: Annotated[str, typer.Option("--expires-in", metavar="TIME", help="Such as 1h, or never.")] = "1h",
    json: Json = False,
) -> None:
    """Make a token with which machines join a site. It is shown this once."""
    with Client() as client:
        made = client.joining_token(name, expires_in=expires_in)
        url = client.url
    if json:
        emit(made)
        return
    url = str(made.get("url") or url)
    pinned = f" --fingerprint {made['fingerprint']}" if made.get("fingerprint") else ""
    say(f"tidemill join {url.removeprefix('http://')} --token {made['token']}{pinned}")
    until = f", until {clock(int(made['expires_at_ns']))}" if made["expires_at_ns"] else ""
    note(f"run that on each machine of {made['site']}, with an address that it reaches this host by{until}")


def site_remove(
    outpost: Annotated[str, typer.Argument(metavar="OUTPOST", help="Its name or id; see tidemill site list.")],
    json: Json = False,
) -> None:
    """Take an outpost out of its site from here: its machines are drained; asked again once nothing runs, they go."""
    with Client() as client:
        answer = client.remove_outpost(outpost)
    if json:
        emit(answer)
    elif answer["left"]:
        say(f"{outpost} is not part of the cloud any more")
    else:
        say(f"{outpost} is being drained: {count(len(answer['running']), 'job')} to go; ask again then")


def site_rented(json: Json = False) -> None:
    """The machines that are rented from a cloud, what they cost, and for which jobs nothing is rented."""
    with Client() as client:
        found = client.rentals()
    if json:
        emit(found)
        return
    rows = [
        (
            str(one["machine"]),
            state(str(one["state"])),
            str(one["type"]),
            str(one["market"]),
            f"{format_usd(int(one['micro_per_hour']))}/h",
            age(int(one["created_at_ns"])),
            str(one["cause"]),
        )
        for one in found["items"]
    ]
    table(("machine", "state", "type", "market", "price", "age", "cause"), rows, flexible=6)
    say(f"{format_usd(int(found['spent_micro']))} this month")
    for one in found["not_rented"]:
        note(f"nothing for {one['job']}: {one['sentence']}")
    if found["problem"]:
        note(str(found["problem"]))


site_app = group_of(
    "The places where work runs.",
    list=site_list,
    set=site_set,
    link=site_link,
    token=site_token,
    rented=site_rented,
    remove=site_remove,
)


def _home(given: Path | None) -> Path:
    return given.expanduser().absolute() if given else connection.home() / "outpost"


def _slurm(texts: Iterable[str]) -> list[tuple[str, str]]:
    """The settings of a Slurm site. Raises: InvalidRequest, InvalidSetting for one that there is not."""
    from tidemill.engines.slurmrest import SlurmRest

    given: dict[str, str] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in _SLURM or not value:
            mend = f"Write NAME=VALUE; names are {', '.join(_SLURM)}."
            raise InvalidRequest("Slurm sites have no such setting.", field="slurm", value=text, mend=mend)
        given[name] = value
    if "rest_token" in given:
        given["rest_token"] = str(Path(given["rest_token"]).expanduser().absolute())
    if "rest" in given:
        SlurmRest(given["rest"], user=given.get("rest_user", ""), token_file=given.get("rest_token", ""))
    elif found := [name for name in given if name.startswith("rest_")]:
        mend = "Say where slurmrestd answers, too: --slurm rest=unix:/PATH or rest=http://HOST:6820."
        raise InvalidSetting("It is for slurmrestd.", field=found[0], value=given[found[0]], mend=mend)
    return list(given.items())


def _kubernetes(texts: Iterable[str]) -> list[tuple[str, str]]:
    """The settings of a Kubernetes site. Raises: InvalidSetting for one that there is not."""
    from tidemill.engines.pods import SETTINGS, settings_of

    given: dict[str, str] = {}
    between = re.compile(f",(?=(?:{'|'.join(SETTINGS)})=)")  # a label selector has commas, too
    for pair in (pair for text in texts for pair in between.split(text)):
        name, equals, value = pair.partition("=")
        if not equals or not value:
            mend = "Write for example --kubernetes namespace=tidemill,queue=gpus."
            raise InvalidRequest("A setting is NAME=VALUE.", field="kubernetes", value=pair, mend=mend)
        given[name] = value
    settings_of(given)
    if "kubeconfig" in given:
        given["kubeconfig"] = str(Path(given["kubeconfig"]).expanduser().absolute())
    return list(given.items())


def _volumes(given: Path | None) -> str:
    if given is None:
        return ""
    if not given.is_absolute() or not given.is_dir():
        mend = "Mount the shared folder first, and write its whole path."
        raise InvalidRequest("There is no such folder on this machine.", field="volumes", value=str(given), mend=mend)
    return str(given)


def _data_cache(given: str) -> str:
    try:
        parse_size(given)
    except ValueError as error:
        raise InvalidRequest(str(error), field="data-cache", value=given, mend="Write for example 100GB.") from error
    return given


def _prices(given: list[str]) -> dict[str, float]:
    """US dollars an hour by resource; none at all for the word ``none``."""
    if given == ["none"]:
        return {}
    found = {}
    for text in given:
        resource, _, price = text.partition("=")
        try:
            found[resource] = float(price.removeprefix("$"))
        except ValueError:
            mend = "Write for example --price H100=1.90, or --price cpu=0.03."
            raise InvalidRequest("A price is NAME=USD.", field="price", value=text, mend=mend) from None
    return found


def _hours(text: str) -> list[float]:
    if text == "none":
        return []
    try:
        hours = [float(part) for part in text.split(",")]
    except ValueError:
        hours = []
    if len(hours) != 24:
        mend = "Write 24 numbers with commas between them, from midnight UTC on; or none."
        raise InvalidRequest("It is not an intensity for each hour.", field="carbon-by-hour", value=text, mend=mend)
    return hours


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise InvalidRequest(
            "A label is NAME=VALUE.", field="label", value=text, mend="Write for example --label disk=nvme."
        )
    return name, value
