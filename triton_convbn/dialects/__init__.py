"""One file a dialect: how a conv and a BatchNorm are written in it."""
