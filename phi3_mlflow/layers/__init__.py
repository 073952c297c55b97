"""A checkpoint run one decoder layer at a time: the model as a whole is never in memory."""
