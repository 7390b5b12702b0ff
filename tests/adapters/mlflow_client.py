"""What a program does with MLflow's own client; run by a Python that has it, against ``MLFLOW_TRACKING_URI``.

``python mlflow_client.py FOLDER OTHER``: FOLDER has a model, OTHER is a project that the token may not see. Prints JSON.
"""

import json
import os
import pathlib
import sys

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking import MlflowClient

folder = pathlib.Path(sys.argv[1])
client = MlflowClient()
told: dict[str, object] = {}


def refused(call: object, *arguments: object, **named: object) -> str:
    try:
        call(*arguments, **named)  # type: ignore[operator]
    except MlflowException as error:
        return error.error_code
    return "not refused"


# a model is uploaded, registered and downloaded
repository = get_artifact_repository("mlflow-artifacts:/uploads/first")
repository.log_artifacts(str(folder))
told["uploaded"] = sorted(one.path for one in repository.list_artifacts())
told["below"] = [(one.path, one.is_dir, one.file_size) for one in repository.list_artifacts("sub")]
made = mlflow.register_model("mlflow-artifacts:/uploads/first", "with-client", tags={"kind": "first"})
told["made"] = [made.name, int(made.version), made.status, made.current_stage, made.tags]
again = mlflow.register_model("mlflow-artifacts:/uploads/first", "with-client")
told["again"] = int(again.version)
got = pathlib.Path(mlflow.artifacts.download_artifacts("models:/with-client/1", dst_path=str(folder.parent / "got")))
told["got"] = {
    str(one.relative_to(got)): one.read_bytes().hex()
    for one in sorted(got.rglob("*"))
    if one.is_file() and one.name != "registered_model_meta"
}
one_file = mlflow.artifacts.download_artifacts("models:/with-client/1/sub/note.txt")
told["one"] = pathlib.Path(one_file).read_text()
told["listed"] = sorted(one.path for one in mlflow.artifacts.list_artifacts("models:/with-client/2"))

# stages, aliases, tags, descriptions
client.transition_model_version_stage("with-client", "1", "Production")
client.transition_model_version_stage("with-client", "2", "production", archive_existing_versions=True)
told["stages"] = {v.version: v.current_stage for v in client.search_model_versions("name = 'with-client'")}
told["latest"] = {v.current_stage: int(v.version) for v in client.get_latest_versions("with-client")}
told["production"] = [int(v.version) for v in client.get_latest_versions("with-client", stages=["Production"])]
by_stage = mlflow.artifacts.list_artifacts("models:/with-client/Production")
told["by stage"] = sorted(one.path for one in by_stage)
client.set_registered_model_alias("with-client", "champion", 1)
told["champion"] = int(client.get_model_version_by_alias("with-client", "champion").version)
told["by alias"] = sorted(one.path for one in mlflow.artifacts.list_artifacts("models:/with-client@champion"))
told["aliases"] = client.get_registered_model("with-client").aliases
client.delete_registered_model_alias("with-client", "champion")
client.set_model_version_tag("with-client", "2", "quality", "good")
client.delete_model_version_tag("with-client", "1", "kind")
client.set_registered_model_tag("with-client", "team", "a b")
client.update_model_version("with-client", "2", description="the second")
client.update_registered_model("with-client", description="a model")
second, model = client.get_model_version("with-client", "2"), client.get_registered_model("with-client")
told["second"] = [second.tags, second.description, second.run_id]
told["first tags"] = client.get_model_version("with-client", "1").tags
told["model"] = [
    model.tags,
    model.description,
    dict(model.aliases),
    sorted(int(v.version) for v in model.latest_versions),
]
client.delete_registered_model_tag("with-client", "team")

# searches
for name in ("alpha", "beta", "gamma"):
    client.create_registered_model(name, tags={"greek": "yes", "first": name[0]}, description=name)
told["greek"] = [m.name for m in client.search_registered_models("tags.greek = 'yes' AND name != 'beta'")]
told["like"] = [m.name for m in client.search_registered_models("name LIKE '%a%' AND tags.`first` ILIKE 'G'")]
told["ordered"] = [m.name for m in client.search_registered_models("tags.greek = 'yes'", order_by=["name DESC"])]
page = client.search_registered_models("tags.greek = 'yes'", max_results=2)
rest = client.search_registered_models("tags.greek = 'yes'", max_results=2, page_token=page.token)
told["pages"] = [[m.name for m in page], [m.name for m in rest], rest.token or ""]
found = client.search_model_versions("name = 'with-client' AND version_number > 1", order_by=["version_number DESC"])
told["newer"] = [int(v.version) for v in found]

# copies, names, deletions and errors
copied = client.copy_model_version("models:/with-client/2", "copied")
told["copied"] = [copied.name, int(copied.version), copied.source]
client.rename_registered_model("gamma", "delta")
told["renamed"] = client.get_registered_model("delta").name
told["errors"] = {
    "taken": refused(client.create_registered_model, "alpha"),
    "missing": refused(client.get_registered_model, "nothing"),
    "no version": refused(client.get_model_version, "alpha", "7"),
    "filter": refused(client.search_registered_models, "name ~ 'x'"),
    "source": refused(client.create_model_version, "alpha", "file:///etc", None),
    "nothing there": refused(client.create_model_version, "alpha", "mlflow-artifacts:/none", None),
    "stage": refused(client.transition_model_version_stage, "with-client", "1", "Nowhere"),
    "needed": refused(client.delete_model_version, "with-client", "2"),
    "name": refused(client.create_registered_model, "no/such name"),
}
(folder / "weights.pkl").write_bytes(b"\x80\x04N.")
get_artifact_repository("mlflow-artifacts:/uploads/pickled").log_artifacts(str(folder))
told["pickle"] = refused(client.create_model_version, "alpha", "mlflow-artifacts:/uploads/pickled", None)
client.delete_model_version("with-client", "1")
told["left"] = [int(v.version) for v in client.search_model_versions("name = 'with-client'")]
client.delete_registered_model("delta")
told["names"] = [m.name for m in client.search_registered_models()]
get_artifact_repository("mlflow-artifacts:/uploads/pickled").delete_artifacts()
told["removed"] = get_artifact_repository("mlflow-artifacts:/uploads/pickled").list_artifacts()

# a job as the run that made it; another project
if job := os.environ.get("JOB"):
    of_job = client.create_model_version("of-job", f"runs:/{job}/model", job)
    told["of job"] = [int(of_job.version), of_job.run_id]
mlflow.set_workspace(sys.argv[2]) if hasattr(mlflow, "set_workspace") else os.environ.update(
    MLFLOW_WORKSPACE=sys.argv[2]
)
told["elsewhere"] = [m.name for m in MlflowClient().search_registered_models()]
print(json.dumps(told))
