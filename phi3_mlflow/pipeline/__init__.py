"""What a step is, how one is carried out, and how several are run one after another."""
