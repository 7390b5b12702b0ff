"""The engine of clusters that a platform team runs with Kubernetes: one pod for each worker, which runs the runner.

Tidemill places, and pins each pod to the node that it chose; or, with a ``queue``, pods are handed to Kueue, and a gang
is a pod group, which Kueue admits whole. What is known is in the API server, in objects that bear the launch's id:

1. the Secret is created. Who comes second finds it, and goes on where the first one stopped;
2. the Pod is created under the same name, with a finalizer. Who comes second is told that it exists;
3. the Secret is marked: there was a pod. From now on a pod that is missing is gone, and is made no second time.

A stop writes its grace into the pod's annotations, where the runner sees it, and lowers the pod's deadline, so that the
kubelet ends the pod if the runner does not. A stop of what never came leaves a Secret that a late launch finds.

Source: Kubernetes 1.20 to 1.37, https://kubernetes.io/docs/reference/kubernetes-api; the client of PyPI ``kubernetes``.
"""

from __future__ import annotations

import dataclasses
import email.utils
import json
import logging
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from tidemill.engines import clusterview, pods
from tidemill.engines.pods import Document, KubernetesSettings
from tidemill.errors import Conflict, EngineLost, EngineRefused, InvalidSetting, TidemillError
from tidemill.model.fleet import Node
from tidemill.model.ids import LaunchId, NodeId, SiteId
from tidemill.model.plan import LaunchSpec, Sight
from tidemill.ports import EngineCapabilities
from tidemill.units import SECOND_NS

log = logging.getLogger(__name__)
_ANSWER_S: Final = 10.0
_PAGE: Final = 500
_NODES_S: Final = 10.0
_BACKSTOP_S: Final = 30
"""So long after its grace the kubelet ends a pod whose runner did not."""
_REPEATED_S: Final = 10.0
_KILL_S: Final = 5
_METADATA: Final = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
_METADATA_LIST: Final = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
_NOT_OVER: Final = "status.phase!=Succeeded,status.phase!=Failed"


class ApiRefused(Exception):
    """The API server answered no. ``status`` is HTTP's, ``reason`` and ``message`` are its own words."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        self.status = status
        self.reason = reason
        self.message = message
        super().__init__(f"{status} {reason}: {message}")


class ApiServer:
    """The API server of a cluster, asked through the official client, with documents as plain JSON.

    Raises, from its methods: EngineLost when it does not answer, ApiRefused when it says no.
    """

    def __init__(self, *, kubeconfig: str = "", context: str = "") -> None:
        """Raises: InvalidSetting without the client, or without a cluster's address and credentials."""
        try:
            from kubernetes import client
            from kubernetes import config as finding
        except ImportError:
            raise InvalidSetting(
                "The client of Kubernetes is not installed.", field="engine", value="kubernetes",
                mend="Install it: pip install 'tidemill[kubernetes]'.",
            ) from None  # fmt: skip
        config: Any = finding
        configuration = client.Configuration()
        try:
            if os.environ.get("KUBERNETES_SERVICE_HOST") and not (kubeconfig or os.environ.get("KUBECONFIG")):
                config.load_incluster_config(client_configuration=configuration)
            else:
                config.load_kube_config(
                    config_file=kubeconfig or None, context=context or None, client_configuration=configuration
                )
        except (config.ConfigException, OSError) as error:
            raise InvalidSetting(
                f"There is no way to a cluster: {error}", field="kubeconfig",
                value=kubeconfig or os.environ.get("KUBECONFIG", "~/.kube/config"),
                mend="Set KUBECONFIG, or --kubernetes kubeconfig=FILE; in a pod, give it a service account.",
            ) from None  # fmt: skip
        configuration.retries = False
        self.host = str(configuration.host)
        self._client: Any = client.ApiClient(configuration)
        self._broken = (client.ApiException, OSError)

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        query: Mapping[str, str] | None = None,
        accept: str = "application/json",
        patch: str = "merge-patch",
    ) -> tuple[Document, float]:
        """The document that it answers with, and its own time in seconds since 1970."""
        headers = {"Accept": accept}
        if body is not None:
            headers["Content-Type"] = f"application/{patch}+json" if method == "PATCH" else "application/json"
        try:
            method, url, headers, sent, _ = self._client.param_serialize(
                method, path, query_params=list((query or {}).items()), header_params=headers, body=body,
                auth_settings=["BearerToken"],
            )  # fmt: skip
            response: Any = self._client.call_api(method, url, headers, sent, _request_timeout=_ANSWER_S)
            content = response.read()
        except Exception as error:
            if not isinstance(error, self._broken) and "urllib3" not in type(error).__module__:
                raise
            raise EngineLost(f"the API server at {self.host} does not answer: {error}") from error
        document = _json(content)
        if response.status < 300:
            sent_at = email.utils.parsedate_tz(response.headers.get("Date") or "")
            return document, email.utils.mktime_tz(sent_at) if sent_at else time.time()
        reason, message = str(document.get("reason") or response.reason), str(document.get("message") or "")
        if response.status in (401, 408, 429) or response.status >= 500:
            raise EngineLost(f"the API server at {self.host}: {response.status} {reason}: {message}")
        raise ApiRefused(response.status, reason, message)

    def find(self, path: str, *, accept: str = "application/json") -> Document | None:
        """The document there, None when there is none."""
        try:
            return self.ask("GET", path, accept=accept)[0]
        except ApiRefused as refusal:
            if refusal.status == 404:
                return None
            raise

    def everything(
        self, path: str, *, labels: str = "", fields: str = "", accept: str = "application/json"
    ) -> Iterator[Document]:
        """Everything there, as it was at one moment after this was asked; in pages, begun anew when they expire."""
        for _ in range(3):
            try:
                yield from self._pages(path, {"labelSelector": labels, "fieldSelector": fields}, accept)
                return
            except ApiRefused as refusal:
                if refusal.status != 410:
                    raise
        raise EngineLost(f"the API server at {self.host}: its lists expire before they are read")

    def _pages(self, path: str, query: Mapping[str, str], accept: str) -> list[Document]:
        given = {name: value for name, value in query.items() if value} | {"limit": str(_PAGE)}
        found: list[Document] = []
        while True:
            page, _ = self.ask("GET", path, query=given, accept=accept)
            found += page.get("items") or ()
            if not (onward := (page.get("metadata") or {}).get("continue")):
                return found
            given["continue"] = onward

    def close(self) -> None:
        """Drop the connections."""
        self._client.close()


class KubernetesEngine:
    """Starts workers as pods of the cluster that ``api`` is of. Keeps the contract of engines.

    Raises, from its methods: EngineLost when the API server does not answer, EngineRefused when it says no.
    """

    def __init__(self, api: ApiServer, *, site_id: SiteId, settings: KubernetesSettings | None = None) -> None:
        self._api = api
        self._site_id = site_id
        self._settings = settings or KubernetesSettings()
        self._lock = threading.Lock()
        self._nodes: dict[str, Document] = {}
        self._nodes_read_s = float("-inf")
        self._looked_s = float("-inf")
        self._has_runner = False

    @property
    def capabilities(self) -> EngineCapabilities:
        """What this engine can do; with a queue, nodes and devices are Kueue's choice and the scheduler's."""
        return EngineCapabilities(name="kubernetes", images=True, exec=True, places=not self._settings.queue)

    def nodes(self) -> tuple[Node, ...]:
        """The cluster's nodes that are heard of, with what pods of others leave of them."""
        documents = self._read_nodes(fresh=True)
        ours = list(self._api.everything(self._path("pods"), labels=pods.selector(self._site_id)))
        others = clusterview.used_by(self._all_pods(), self._is_ours)
        held = clusterview.devices_held(ours)
        found = (
            clusterview.node_of(document, self._site_id, others.get(name, {}), held)
            for name, document in sorted(documents.items())
            if clusterview.is_heard(document)
        )
        return tuple(node for node in found if node is not None)

    def launch(self, spec: LaunchSpec) -> None:
        """Have that worker's pod made; nothing more when its launch id was launched before, even if it ended."""
        settings = self._settings
        pods.refuse(spec)
        spec = self._seen_from_pods(spec)
        try:
            chosen = None if settings.queue else self._chosen(spec.node_id)
            self._have_runner()
            wanted = pods.secret_of(spec, settings, self._site_id)
            secret = self._create("secrets", wanted) or self._known("secrets", wanted)
            labels = secret["metadata"].get("labels") or {}
            if labels.get(pods.STARTED) or labels.get(pods.STOPPED):
                return
            wanted = pods.pod_of(spec, settings, self._site_id, chosen)
            pod = self._create("pods", wanted) or self._known("pods", wanted)
            self._mark_started(spec, pod)
        except ApiRefused as refusal:
            raise _translated(refusal) from refusal

    def stop(self, launch_id: LaunchId, *, node_id: NodeId, grace_ns: int) -> None:
        """Have a worker signalled, and killed with all it started after the grace; remembered when unknown."""
        try:
            stop, is_repeated = self._write_stop(launch_id, node_id, grace_ns)
            pod = self._api.find(self._path("pods", pods.object_name(launch_id)))
            if pod is None or clusterview.is_over(pod, now_s=time.time()):
                return
            self._stop_pod(pod, stop, is_repeated=is_repeated)
        except ApiRefused as refusal:
            if refusal.status not in (404, 409):
                raise _translated(refusal) from refusal
            log.debug("%s moved on while it was stopped: %s", launch_id, refusal)

    def observe(self) -> Sight:
        """Every launch that it has not forgotten, from the API server's lists; of nodes not heard of, nothing."""
        self._pace()
        try:
            labels = pods.selector(self._site_id)
            records = list(self._api.everything(self._path("secrets"), labels=labels, accept=_METADATA_LIST))
            ours = list(self._api.everything(self._path("pods"), labels=labels))
            documents = self._read_nodes()
            seen = clusterview.observations(records, ours, self._heard_of(documents), now_s=time.time())
        except ApiRefused as refusal:
            raise _translated(refusal) from refusal
        names = (name for name, document in documents.items() if clusterview.is_heard(document))
        return Sight(nodes=frozenset(clusterview.node_id_of(self._site_id, name) for name in names), launches=seen)

    def forget(self, launch_id: LaunchId, *, node_id: NodeId) -> None:  # noqa: ARG002 - ids are enough
        """Drop what is kept of a launch that is gone. Raises: Conflict while anything of it lives."""
        name = pods.object_name(launch_id)
        try:
            pod = self._api.find(self._path("pods", name))
            if pod is not None:
                if not self._is_gone(pod):
                    raise Conflict(f"{launch_id} still runs")
                self._let_go(pod)
            self._delete("secrets", name)
        except ApiRefused as refusal:
            if refusal.status == 409:
                raise Conflict(f"{launch_id} changes still: {refusal.message}") from refusal
            raise _translated(refusal) from refusal

    def close(self) -> None:
        """Let go without touching what runs."""
        self._api.close()

    # ------------------------------------------------------------------ launching

    def _seen_from_pods(self, spec: LaunchSpec) -> LaunchSpec:
        """The launch with the control plane's address as it is from pods. Raises: EngineRefused for a loopback."""
        url = self._settings.api_url or spec.api_url
        host = urlsplit(url).hostname or ""
        if not self._settings.host_network and (host == "localhost" or host.startswith("127.") or host == "::1"):
            raise EngineRefused(
                f"Pods cannot reach the control plane at {url}.", field="api_url", value=url,
                mend="Join with an address that pods reach, or with --kubernetes api_url=URL.",
            )  # fmt: skip
        variables = dict(spec.environment_variables)
        if "TIDEMILL_API_URL" in variables:
            variables["TIDEMILL_API_URL"] = url
            if self._settings.api_url:
                variables["TIDEMILL_API_URLS"] = url
        return dataclasses.replace(spec, api_url=url, environment_variables=tuple(variables.items()))

    def _chosen(self, node_id: NodeId) -> pods.Chosen:
        name = clusterview.node_name_of(self._site_id, node_id)
        document = self._api.find(f"/api/v1/nodes/{name}") if name else None
        if document is None:
            raise EngineLost(f"{node_id} is not in the cluster now")
        return pods.Chosen(name=name, taints=clusterview.taints_of(document))

    def _have_runner(self) -> None:
        """Nothing, once the cluster has this version of the runner."""
        if self._has_runner and self._api.find(self._path("configmaps", pods.runner_name()), accept=_METADATA):
            return
        self._create("configmaps", pods.runner_map(self._settings.namespace))
        self._has_runner = True

    def _create(self, kind: str, document: Document) -> Document | None:
        """What was created; None when there is one of that name."""
        try:
            return self._api.ask("POST", self._path(kind), document)[0]
        except ApiRefused as refusal:
            if refusal.reason != "AlreadyExists":
                raise
            return None

    def _known(self, kind: str, document: Document) -> Document:
        """The one of that name that there is. Raises: EngineRefused when it is somebody else's."""
        found = self._api.find(self._path(kind, _name(document)))
        if found is None:
            raise EngineLost(f"{document['kind']} {_name(document)} was there, and is not any more")
        if _annotation(found, pods.LAUNCH) != _annotation(document, pods.LAUNCH):
            raise EngineRefused(
                f"There is another {document['kind']} {_name(document)} in {self._settings.namespace}.",
                field="namespace", value=self._settings.namespace, mend="Give Tidemill a namespace of its own.",
            )  # fmt: skip
        return found

    def _mark_started(self, spec: LaunchSpec, pod: Document) -> None:
        """Say in the Secret that there was a pod, with which it goes; stop that pod if a stop came meanwhile."""
        if pods.needs_service(spec, self._settings) and spec.rank == 0:
            self._create("services", pods.service_of(spec, self._settings, self._site_id, owner=pod))
        mark = {"metadata": {"labels": {pods.STARTED: "true"}, "ownerReferences": [pods.owner_of(pod)]}}
        secret, _ = self._api.ask("PATCH", self._path("secrets", _name(pod)), mark)
        if stop := _json(_annotation(secret, pods.STOP).encode()):
            self._stop_pod(pod, stop, is_repeated=False)

    # ------------------------------------------------------------------ stopping

    def _write_stop(self, launch_id: LaunchId, node_id: NodeId, grace_ns: int) -> tuple[Document, bool]:
        """The stop as it is written down now, with the least grace of all; and whether it should be over by now."""
        name = pods.object_name(launch_id)
        fresh = {"grace_ns": grace_ns, "at_ns": time.time_ns()}
        tombstone = pods.tombstone_of(launch_id, self._settings, self._site_id, node_id=node_id, stop=json.dumps(fresh))
        if self._create("secrets", tombstone) is not None:
            return fresh, False
        known = self._known("secrets", tombstone)
        before = _json(_annotation(known, pods.STOP).encode())
        since_s = (time.time_ns() - int(before.get("at_ns", time.time_ns()))) / SECOND_NS
        is_repeated = bool(before) and since_s > int(before["grace_ns"]) / SECOND_NS + _REPEATED_S
        if before and before["grace_ns"] <= grace_ns:
            return before, is_repeated
        stop = {**fresh, "at_ns": before.get("at_ns", fresh["at_ns"])}
        changed = {"labels": {pods.STOPPED: "true"}, "annotations": {pods.STOP: json.dumps(stop)}}
        self._api.ask("PATCH", self._path("secrets", name), {"metadata": changed})
        return stop, is_repeated

    def _stop_pod(self, pod: Document, stop: Mapping[str, Any], *, is_repeated: bool) -> None:
        path = self._path("pods", _name(pod))
        started = str((pod.get("status") or {}).get("startTime") or "")
        change: Document = {"metadata": {"annotations": {pods.STOP: json.dumps(stop)}}}
        if _annotation(pod, pods.STOP) != json.dumps(stop):
            pod, now_s = self._api.ask("PATCH", path, change)
            if started:
                self._lower_deadline(pod, stop, since_s=now_s - clusterview.moment_s(started))
        if is_repeated:
            self._delete("pods", _name(pod), grace_s=_KILL_S, uid=pod["metadata"]["uid"])
        elif not pod["spec"].get("nodeName") and not pod["metadata"].get("deletionTimestamp"):
            version = str(pod["metadata"]["resourceVersion"])  # if it gets a node meanwhile, that node's runner ends it
            self._delete("pods", _name(pod), uid=pod["metadata"]["uid"], version=version)

    def _lower_deadline(self, pod: Document, stop: Mapping[str, Any], *, since_s: float) -> None:
        deadline_s = max(1, math.ceil(since_s + int(stop["grace_ns"]) / SECOND_NS)) + _BACKSTOP_S
        before = pod["spec"].get("activeDeadlineSeconds")
        if before is None or deadline_s < before:
            change = {"spec": {"activeDeadlineSeconds": deadline_s}}
            self._api.ask("PATCH", self._path("pods", _name(pod)), change)

    def _delete(self, kind: str, name: str, *, grace_s: int | None = None, uid: str = "", version: str = "") -> None:
        """Nothing; it is being deleted, or was not there. With ``uid`` and ``version``, only as it was seen."""
        wanted = {"uid": uid, "resourceVersion": version}
        options: Document = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        options["preconditions"] = {key: value for key, value in wanted.items() if value}
        if grace_s is not None:
            options["gracePeriodSeconds"] = grace_s
        try:
            self._api.ask("DELETE", self._path(kind, name), options)
        except ApiRefused as refusal:
            if refusal.status != 404:
                raise

    # ------------------------------------------------------------------ forgetting

    def _is_gone(self, pod: Document) -> bool:
        if clusterview.is_over(pod, now_s=time.time()):
            return True
        on = str(pod["spec"].get("nodeName") or "")
        given_up = pod["metadata"].get("deletionTimestamp") or pod["status"].get("phase") in ("Succeeded", "Failed")
        return bool(on and given_up) and self._api.find(f"/api/v1/nodes/{on}") is None

    def _let_go(self, pod: Document) -> None:
        """Have the pod deleted, and take our finalizer off it; those of others are theirs."""
        metadata = pod["metadata"]
        self._delete("pods", _name(pod), uid=metadata["uid"])
        path = self._path("pods", _name(pod))
        found = self._api.find(path)
        if found is None or found["metadata"]["uid"] != metadata["uid"]:
            return
        left = [one for one in found["metadata"].get("finalizers") or () if one != pods.FINALIZER]
        change = {"metadata": {"finalizers": left, "resourceVersion": found["metadata"]["resourceVersion"]}}
        try:
            self._api.ask("PATCH", path, change)
        except ApiRefused as refusal:
            if refusal.status != 404:
                raise

    # ------------------------------------------------------------------ looking

    def _pace(self) -> None:
        """An API server is everybody's: looks do not follow each other too fast."""
        with self._lock:
            rest_s = self._looked_s + self._settings.look_ns / SECOND_NS - time.monotonic()
            if rest_s > 0:
                time.sleep(rest_s)
            self._looked_s = time.monotonic()

    def _read_nodes(self, *, fresh: bool = False) -> dict[str, Document]:
        """The nodes by name, not much older than a kubelet's word about itself may be."""
        with self._lock:
            if fresh or time.monotonic() - self._nodes_read_s > _NODES_S:
                try:
                    listed = self._api.everything("/api/v1/nodes", labels=self._settings.select)
                    self._nodes = {_name(document): document for document in listed}
                except ApiRefused as refusal:
                    raise _translated(refusal) from refusal
                self._nodes_read_s = time.monotonic()
            return self._nodes

    def _heard_of(self, documents: Mapping[str, Document]) -> Any:
        asked: dict[str, bool | None] = {}

        def heard(name: str) -> bool | None:
            if (document := documents.get(name)) is not None:
                return clusterview.is_heard(document)
            if name not in asked:
                found = self._api.find(f"/api/v1/nodes/{name}")
                asked[name] = clusterview.is_heard(found) if found is not None else None
            return asked[name]

        return heard

    def _all_pods(self) -> list[Document]:
        """The pods of the whole cluster; none when only the own namespace may be read."""
        try:
            return list(self._api.everything("/api/v1/pods", fields=_NOT_OVER))
        except ApiRefused as refusal:
            if refusal.status != 403:
                raise _translated(refusal) from refusal
            log.info("what pods of others use is not seen: %s", refusal.message)
            return []

    def _is_ours(self, pod: Mapping[str, Any]) -> bool:
        metadata = pod["metadata"]
        labels = metadata.get("labels") or {}
        return (
            metadata.get("namespace") == self._settings.namespace
            and labels.get(pods.SITE) == self._site_id
            and labels.get(pods.OWNER[0]) == pods.OWNER[1]
        )

    def _path(self, kind: str, name: str = "") -> str:
        return f"/api/v1/namespaces/{self._settings.namespace}/{kind}" + (f"/{name}" if name else "")


def _translated(refusal: ApiRefused) -> TidemillError:
    """The refusal as the contract has it: what is over quota now may not be later, what is invalid stays so."""
    if refusal.status == 403 and "exceeded quota" in refusal.message:
        return EngineLost(f"Kubernetes: {refusal.message}")
    if refusal.status == 403:
        return EngineRefused(
            f"Kubernetes forbids it: {refusal.message}", field="kubernetes",
            mend="Compare the rights with examples/kubernetes/rbac.yaml, and the pod security level of the namespace.",
        )  # fmt: skip
    if refusal.status == 409:
        return EngineLost(f"Kubernetes: {refusal.message}")
    return EngineRefused(
        f"Kubernetes refused it: {refusal.message or refusal.reason}", field="kubernetes",
        mend="See that the namespace and the objects that the settings name are there.",
    )  # fmt: skip


def _name(document: Mapping[str, Any]) -> str:
    return str(document["metadata"]["name"])


def _annotation(document: Mapping[str, Any], name: str) -> str:
    return str((document["metadata"].get("annotations") or {}).get(name) or "")


def _json(content: bytes) -> Document:
    try:
        value = json.loads(content) if content else {}
    except ValueError:
        return {"message": content[:200].decode(errors="replace")}
    return value if isinstance(value, dict) else {}
