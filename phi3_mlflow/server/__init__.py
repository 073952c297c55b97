"""A server for registered models that speaks OpenAI's protocol and MLflow's."""
