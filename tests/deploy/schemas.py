"""What the API server would say to a manifest, as far as that can be known offline.

Core kinds are checked against Kubernetes' own schemas. KubeRay's are not published in a package,
so the fields in use are written down here, closed: any other field is an error. Their pod
templates are checked as the pods that they become.
"""

import jsonschema
import kubernetes_validate

KUBERNETES = "1.34"

TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}
POD_TEMPLATE = {"type": "object", "required": ["spec"]}


def closed(required: list[str], **properties: dict) -> dict:
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


RAY_CLUSTER = closed(
    ["headGroupSpec"],
    rayVersion={"type": "string"},
    authOptions=closed([], mode={"enum": ["token", "disabled"]}),
    headGroupSpec=closed(
        ["template"],
        serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
        rayStartParams=TEXTS,
        template=POD_TEMPLATE,
    ),
    workerGroupSpecs={
        "type": "array",
        "items": closed(
            ["groupName", "template", "minReplicas", "maxReplicas"],
            groupName={"type": "string"},
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            rayStartParams=TEXTS,
            template=POD_TEMPLATE,
        ),
    },
)
RAY_JOB = closed(
    ["entrypoint"],
    clusterSelector=TEXTS,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]},
    entrypoint={"type": "string"},
    shutdownAfterJobFinishes={"type": "boolean"},
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
)
CUSTOM = {"RayCluster": RAY_CLUSTER, "RayJob": RAY_JOB}


class Refused(Exception):
    """The manifest would be refused."""


def check(manifest: dict) -> None:
    """Raise `Refused` for what a strict API server would not take."""
    kind = manifest["kind"]
    try:
        if kind in CUSTOM:
            assert manifest["apiVersion"] == "ray.io/v1"
            whole = closed(
                ["apiVersion", "kind", "metadata", "spec"],
                apiVersion={},
                kind={},
                metadata={},
                spec=CUSTOM[kind],
            )
            jsonschema.validate(manifest, whole)
        else:
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        for template in templates(manifest):
            pod = {"apiVersion": "v1", "kind": "Pod"} | template
            pod["metadata"] = {"name": "pod"} | template.get("metadata", {})
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    except (jsonschema.ValidationError, kubernetes_validate.ValidationError) as error:
        raise Refused(f"{kind} {manifest['metadata']['name']}: {error.message}") from None


def templates(manifest: dict) -> list[dict]:
    """The pod templates of a manifest of any kind."""
    spec = manifest.get("spec", {})
    if manifest["kind"] == "RayCluster":
        groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
        return [group["template"] for group in groups]
    return [spec["template"]] if "template" in spec else []
