"""MLServer's identity: a custom runtime that answers its input's data as it came. Runs in MLServer's environment."""

# Neither it nor its types are installed where this is checked.
from mlserver import MLModel  # type: ignore[import-not-found]
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput  # type: ignore[import-not-found]


class Identity(MLModel):  # type: ignore[misc]
    """``INPUT0`` of any shape under the name ``OUTPUT0``, without a detour through numpy."""

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """One request, or several that were merged."""
        given = payload.inputs[0]
        output = ResponseOutput(name="OUTPUT0", shape=given.shape, datatype=given.datatype, data=given.data)
        return InferenceResponse(model_name=self.name, outputs=[output])
