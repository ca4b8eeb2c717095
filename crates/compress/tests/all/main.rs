//! Integration tests of the methods of compression; one program, since linking each alone costs more than it tells.

mod automatic;
mod block_influence;
mod common;
mod curvature;
mod depth_oracle;
mod dimension;
mod entropy;
mod factorise;
mod fisher;
mod fuse;
mod heal;
mod linearise;
mod lorap;
mod modegpt;
mod movement;
mod narrowed;
mod oracle;
mod plan;
mod pruning;
mod quality;
mod quantise;
mod replace_me;
mod shedder;
mod slicing;
mod trained;
