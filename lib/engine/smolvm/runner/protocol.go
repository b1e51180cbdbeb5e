// Package runner is the part of the guest helper that runs commands in a
// smolvm guest. "smolvm machine exec" can neither take a command's environment
// off its own argv, nor (before 1.15) change the user, nor pass a signal on,
// nor tell its own failure from the command's exit 1. So it always runs
//
//	/opt/bottle/guest run MARKER      what /opt/bottle/run/MARKER.json asks for
//	/opt/bottle/guest ran MARKER      the status it ended with, as JSON
//	/opt/bottle/guest signal MARKER N send signal N to it
//	/opt/bottle/guest await ADDRESS SOCKET [FOLDER...]
//	                                  end when the helper's relay listens and the
//	                                  keeper has answered on the gate's socket; print
//	                                  the folders' inode numbers
//	/opt/bottle/guest inodes FOLDER...
//	                                  print them
//
// or does that with LocalHelper, a copy in the guest's memory, which starts more
// quickly. MARKER is random for each command. What ran and how it ended is written below
// StateDir, which only the guest's root can write: the agent cannot forge it.
package runner

import "github.com/bottle-tools/bottle/lib/engine"

// RequestDir is where the host puts requests; the guest sees it read-only.
const RequestDir = engine.GuestDir + "/run"

// StateDir is the guest's own memory of what ran. smolvm mounts a tmpfs of root's
// at /run.
const StateDir = "/run/bottle-run"

// LocalHelper is a copy of the helper that is not read from the host each time.
const LocalHelper = StateDir + "/guest"

// NoGate is await's status where the helper is ready and the gate's socket is
// not there, or leads to somebody else.
const NoGate = 123

// Request is one command.
type Request struct {
	Argv []string `json:"argv"`
	Env  []string `json:"env"` // K=V, the whole environment
	Dir  string   `json:"dir"` // absolute
	UID  int      `json:"uid"`
	GID  int      `json:"gid"`
}

// State is what is known of a command: running, or ended with Status.
type State struct {
	PID    int  `json:"pid"`
	Ended  bool `json:"ended"`
	Status int  `json:"status"`
}
