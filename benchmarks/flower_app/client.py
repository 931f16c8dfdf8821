"""The app's client: an adapter comes, is trained, goes back."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from benchmarks.flower_app.task import Work, train

app = ClientApp()


@app.train()
def fit(message: Message, context: Context) -> Message:
    """One round of one client."""
    config = message.content["config"]
    work, client = Work.parse(str(config["work"])), int(context.node_config["partition-id"])
    adapter, loss = train(work, client, int(config["server-round"]), message.content["arrays"].to_torch_state_dict())
    reply = RecordDict({"arrays": ArrayRecord(adapter), "metrics": MetricRecord({"loss": loss, "num-examples": work.steps})})
    return Message(content=reply, reply_to=message)
