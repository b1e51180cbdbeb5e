package probe

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	daemonLife = 15 * time.Second
	floodHold  = 3 * time.Second
	floodMost  = 2000
)

func lifeProbes() []*probe {
	return []*probe{
		{Info: info("R01", "outlives", "C03", "a process that lives on when the sandbox has ended"), batch: batchDaemon, try: func(c *inside, token string) {
			cmd := exec.Command(os.Args[0], roleDaemon, token, filepath.Join(c.Workspace, "beat-"+token))
			cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
			if cmd.Start() == nil {
				time.Sleep(300 * time.Millisecond) // for it to get going
			}
		}, leak: func(l *lab, token string) string { return l.outlived(token) }},
		{Info: info("R02", "flood", "C03", "more processes than the sandbox claims to allow"), batch: batchFlood, skip: func(l *lab) string {
			if l.o.Pids == 0 {
				return "no limit was claimed (--pids)"
			}
			if l.o.Pids > floodMost {
				return "the limit is higher than what is tried at most: " + strconv.Itoa(floodMost)
			}
			return ""
		}, try: func(c *inside, token string) {
			dir := filepath.Join(c.Workspace, "flood-"+token)
			_ = os.MkdirAll(dir, 0o777)
			var started []*exec.Cmd
			for i := range c.Pids + 50 {
				cmd := exec.Command(os.Args[0], roleSleeper, filepath.Join(dir, strconv.Itoa(i)))
				if cmd.Start() == nil {
					started = append(started, cmd)
				}
			}
			time.Sleep(floodHold)
			for _, cmd := range started {
				_ = cmd.Process.Kill()
				_ = cmd.Wait()
			}
		}, leak: func(l *lab, token string) string {
			if most := l.most(token); most > l.o.Pids {
				return fmt.Sprintf("%d processes were alive at once, the limit is %d", most, l.o.Pids)
			}
			return ""
		}},
		{Info: info("R04", "wrapper-killed", "C03", "the command goes on when what started the sandbox is killed (SIGKILL)"), batch: batchKilled, try: func(c *inside, token string) {
			_ = daemon([]string{token, filepath.Join(c.Workspace, "beat-"+token)})
		}, leak: func(l *lab, token string) string {
			found := l.outlived(token)
			if l.group != nil {
				_ = syscall.Kill(-l.group.Pid, syscall.SIGKILL)
			}
			return found
		}},
		{Info: info("R03", "terminal", "", "characters pushed into the caller's terminal (TIOCSTI)"), batch: batchTerminal, skip: func(l *lab) string { return l.noTerminal }, try: func(_ *inside, token string) {
			for _, fd := range terminals() {
				for _, b := range []byte(token + "\n") {
					if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TIOCSTI, uintptr(unsafe.Pointer(&b))); errno != 0 {
						break
					}
				}
			}
		}, leak: func(l *lab, token string) string {
			if strings.Contains(l.pushed, token) {
				return fmt.Sprintf("the terminal's input holds %q", token)
			}
			return ""
		}},
	}
}

// terminals are the descriptors that may be one.
func terminals() []int {
	fds := []int{0, 1, 2}
	for _, name := range []string{"/dev/tty", "/dev/console"} {
		if fd, err := unix.Open(name, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0); err == nil {
			fds = append(fds, fd)
		}
	}
	return fds
}

// daemon writes its file anew until its time is over, whoever has gone.
func daemon(args []string) error {
	if len(args) != 2 {
		return nil
	}
	for until := time.Now().Add(daemonLife); time.Now().Before(until); time.Sleep(50 * time.Millisecond) {
		_ = os.WriteFile(args[1], []byte(time.Now().String()), 0o644)
	}
	return nil
}

// sleeper is there, and says so again and again.
func sleeper(args []string) error {
	if len(args) != 1 {
		return nil
	}
	for until := time.Now().Add(2 * floodHold); time.Now().Before(until); time.Sleep(500 * time.Millisecond) {
		_ = os.WriteFile(args[0], []byte(time.Now().String()), 0o644)
	}
	return nil
}
