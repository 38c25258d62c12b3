"""One model that answers for many adapters: whose turn it is, what stands in the weights, and how rows are decoded."""
