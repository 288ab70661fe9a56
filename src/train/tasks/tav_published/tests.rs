//! Tests of the task on the smallest networks.
